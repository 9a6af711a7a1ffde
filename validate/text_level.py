"""Level 5 of a model that writes text: what its graph makes of the text that it is given, and the steps drawn from that text."""

from onnx import TensorProto

from suture.core.errors import UserError
from suture.core.reader import TEXT_LIMIT, read_bytes
from suture.models.tokenizer import Tokenizer, open_tokenizer
from suture.runtime.graphs import OnnxDecoder
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.level import SHADOW_COPY_NOTE, TITLES, Level
from suture.validate.pipeline import Pipeline
from suture.validate.reference import open_reference
from suture.validate.scenarios import Scenario, make_scenarios, random_tokens, text_tokens
from suture.validate.tokens import compare_tokens, quantisation_cost


def read_text(pipeline: Pipeline) -> tuple[Tokenizer | None, list[int], str | None]:
    """The tokenizer and the text's tokens, or why there are none."""
    if pipeline.checkpoint is None:
        return None, [], "needs the checkpoint's tokenizer"
    try:
        tokenizer = open_tokenizer(pipeline.checkpoint)
    except UserError as error:
        return None, [], f"the checkpoint's tokenizer cannot be read ({error})"
    if pipeline.text is None:
        return tokenizer, [], "no text to read: give one with --text"
    ids = tokenizer.encode(read_bytes(pipeline.text, TEXT_LIMIT).decode("utf-8", "replace"))
    if len(ids) < 64:
        return tokenizer, [], f"the text is too short: {len(ids)} tokens"
    return tokenizer, ids, None


def scenarios_for(pipeline: Pipeline, graph: OnnxDecoder, seed: int) -> list[Scenario]:
    """What a graph of the pipeline is asked: its text where there is one, else random tokens."""
    _, ids, _ = read_text(pipeline)
    source = text_tokens(ids, seed) if ids else random_tokens(graph.vocab, seed)
    return make_scenarios(source, graph.capacity, graph.trained_length, prefix=graph.prefix)


def token_level(pipeline: Pipeline, portable: OnnxDecoder, tokenizer: Tokenizer, ids: list[int]) -> Level:
    """Level 5; for a quantised graph also what the format costs."""
    reference = open_reference(pipeline.checkpoint, lora=pipeline.lora)
    tokens = compare_tokens(reference, portable, tokenizer, ids, portable.dtype, portable.quantised)
    files = pipeline.decoder
    if portable.quantised and files.unquantised:
        graphs = {"before": files.unquantised, "quantised": files.portable}
        tokens.cost = quantisation_cost(
            reference, graphs, portable.quantised, tokenizer, ids, tokens.readings[0], portable.embed
        )
    notes = [SHADOW_COPY_NOTE] if portable.dtype == TensorProto.BFLOAT16 else []
    return Level(5, TITLES[5], PASSED if tokens.passed else DIFFERENT, tokens=tokens, notes=notes)

"""The levels of validation that a pipeline's folder allows, each a comparison with the step before.

1 PyTorch ↔ exported graph. 2 Exported ↔ portable graph. 3 Portable graph ↔ TensorRT's network. 4 Portable graph ↔
engine. 5 Tokens: PyTorch ↔ portable graph on real text. A level that this machine cannot run says why; it has not passed.
A level whose files are broken or lost, though a stage wrote them, has failed.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnx import TensorProto

from suture.core.errors import UserError
from suture.core.manifest import read_manifest, recorded_file
from suture.core.network.compare import ROUNDED
from suture.core.network.evaluate import NotEvaluated
from suture.core.network.parse import NoTensorRT
from suture.models import open_checkpoint
from suture.models.tokenizer import Tokenizer, open_tokenizer, tokenizer_files
from suture.runtime.engine import read_description, takes, why_not
from suture.runtime.engine_decoder import open_engine
from suture.runtime.graphs import OnnxDecoder, open_graph
from suture.runtime.network_decoder import open_network
from suture.validate.bundle import Results, read_results
from suture.validate.compare import DIFFERENT, FAILED, NOT_RUN, PASSED, TOLERANCES, Comparison, ScenarioResult, compare
from suture.validate.encoder import EncoderFiles, compare_encoder
from suture.validate.level import TITLES, Broken, Level, failed, not_run
from suture.validate.progress import Progress
from suture.validate.reference import open_reference
from suture.validate.runners import Model
from suture.validate.scenarios import Scenario, make_scenarios, random_tokens, text_tokens
from suture.validate.tokens import compare_tokens, quantisation_cost

SHADOW_COPY_NOTE = "In onnxruntime, bfloat16 graphs ran as float32 shadow copies with the same weights: its CPU has no bfloat16"

LAYERWISE_NOTE = (
    "The model is too large to be loaded at once: it ran layer by layer, in few steps, over caches of few slots, which "
    "nothing but their shapes depends on"
)


@dataclass(frozen=True)
class Pipeline:
    """The files of a pipeline's folder that validation reads; None where a stage has not written them. One that a stage's
    manifest lists may be gone."""

    exported: Path
    portable: Path | None
    unquantised: Path | None  # the portable graph before it was quantised, where it was
    lowered: Path | None
    engine: Path | None
    checkpoint: Path | None
    text: Path | None
    results: Path | None  # of the bundle's run.py, from a machine with a GPU
    encoder: EncoderFiles | None = None

    @property
    def graphs(self) -> list[Path]:
        files = [self.exported, self.portable, self.unquantised, self.lowered]
        if self.encoder:
            files += [self.encoder.exported, self.encoder.portable, self.encoder.lowered]
        return [path for path in files if path and path.is_file()]

    @property
    def files(self) -> list[Path]:
        """All that is read, but the graphs' weights."""
        described = self.engine and self.engine.with_name("engine.json")
        files = [*self.graphs, *(path for path in (self.engine, described) if path and path.is_file())]
        files += [path for path in (self.text, self.results) if path]
        if self.checkpoint:
            files += tokenizer_files(self.checkpoint)
            with suppress(UserError):  # the level that reads it says what is wrong with it
                files += open_checkpoint(self.checkpoint).files
        return list(dict.fromkeys(files))


def find_pipeline(folder: Path, text: Path | None, results: Path | None = None) -> Pipeline:
    """Raises UserError where there is no exported graph, or `text` is no file."""
    exported = recorded_file(folder / "export", "model.onnx")
    if exported is None:
        raise UserError(folder, "has no export/model.onnx", "name the --out folder of suture/pipeline.py, or two .onnx files")
    if text is not None and not text.is_file():
        raise UserError(text, "no such file", "name a text file with --text")
    recorded = (read_manifest(folder / "export") or {}).get("options", {}).get("checkpoint")
    checkpoint = Path(recorded) if recorded and Path(recorded).is_dir() else None
    heldout = checkpoint / "heldout.txt" if checkpoint else None
    encoder = recorded_file(folder / "export", "encoder.onnx")
    operated = folder / "encoder" / "surgery"
    return Pipeline(
        exported=exported,
        portable=recorded_file(folder / "surgery", "model.onnx"),
        unquantised=recorded_file(folder / "surgery", "float/model.onnx"),
        lowered=recorded_file(folder / "surgery", "model.trt.onnx"),
        engine=recorded_file(folder / "build", "model.engine"),
        checkpoint=checkpoint,
        text=text or (heldout if heldout and heldout.is_file() else None),
        results=results,
        encoder=encoder and EncoderFiles(encoder, *(recorded_file(operated, f"model{end}") for end in (".onnx", ".trt.onnx"))),
    )


def run_levels(
    pipeline: Pipeline, tolerance: float | None, seed: int, save: Callable[[int, str], Path], progress: Progress
) -> list[Level]:
    """All five levels in order, then the first three of an encoder. `save(level, scenario)` names Polygraphy's file."""
    exported, portable = _opened(pipeline.exported, "exported"), _opened(pipeline.portable, "portable")
    tokenizer, ids, no_text = _read_text(pipeline)
    known = next((graph for graph in (exported, portable) if isinstance(graph, OnnxDecoder)), None)
    large = known is not None and known.layerwise
    capacity = portable.capacity if isinstance(portable, OnnxDecoder) else None
    scenarios = []  # of none, where there is no graph to ask
    if known:
        source = text_tokens(ids, seed) if ids else random_tokens(known.vocab, seed)
        scenarios = make_scenarios(source, capacity, known.trained_length, large, known.prefix)

    def run(
        number: int, reference: Model, candidate: Model, allowed: float | None = None, asked: list[Scenario] = scenarios
    ) -> Level:
        comparison = compare(
            reference,
            candidate,
            asked,
            tolerance or allowed,
            save=lambda scenario: save(number, scenario),
            tell=lambda scenario: progress.tell(f"level {number}: {scenario}"),
        )
        notes = [SHADOW_COPY_NOTE] if candidate.dtype == TensorProto.BFLOAT16 else []
        notes += [LAYERWISE_NOTE] if large else []
        return Level(number, TITLES[number], comparison.status, comparison=comparison, notes=notes)

    def text_level() -> Level:
        if not (pipeline.checkpoint and portable):
            return not_run(5, "needs the checkpoint and the portable graph")
        if large:
            return not_run(5, "a model that runs layer by layer takes too long to read a text")
        if no_text:
            return not_run(5, no_text)
        progress.tell("level 5: reading text")
        return token_level(pipeline, portable, tokenizer, ids)

    needs = {1: [exported], 2: [exported, portable], 3: [portable], 4: [portable], 5: [portable]}
    checks = {
        1: lambda: _export_level(pipeline, exported, run, progress.tell),
        2: lambda: _surgery_level(pipeline, exported, portable, run),
        3: lambda: _network_level(pipeline, portable, run, progress.tell),
        4: lambda: _engine_level(pipeline, portable, scenarios, run, progress.tell),
        5: text_level,
    }

    def check(number: int) -> Level:
        broken = next((each for each in needs[number] if isinstance(each, Broken)), None)
        return failed(number, broken.reason) if broken else checks[number]()

    levels = [progress.level(f"level {number}, {TITLES[number]}", partial(check, number)) for number in checks]
    if pipeline.encoder:
        levels += _encoder_levels(pipeline.encoder, pipeline.checkpoint, tolerance, seed, progress)
    return levels


def compare_graphs(
    reference: OnnxDecoder,
    candidate: OnnxDecoder,
    tolerance: float | None = None,
    seed: int = 0,
    save: Callable[[str], Path] | None = None,
    tell: Callable[[str], None] = lambda scenario: None,
) -> Level:
    """Any two graphs with KV caches on random tokens. Raises UserError where they are not of one model."""
    for what in ("vocab", "cache_names"):
        if (ours := getattr(reference, what)) != (theirs := getattr(candidate, what)):
            found = f"{ours} and {theirs}" if what == "vocab" else f"{len(ours)} and {len(theirs)}"
            label = "vocabularies of" if what == "vocab" else "caches that do not pair:"
            raise UserError(f"{reference.name}, {candidate.name}", f"{label} {found}", "compare graphs of one model")
    capacities = [graph.capacity for graph in (reference, candidate) if graph.capacity]
    trained = reference.trained_length or candidate.trained_length
    source, prefix = random_tokens(reference.vocab, seed), reference.prefix or candidate.prefix
    scenarios = make_scenarios(source, min(capacities, default=None), trained, prefix=prefix)
    comparison = compare(reference, candidate, scenarios, tolerance, save, tell)
    notes = [SHADOW_COPY_NOTE] if TensorProto.BFLOAT16 in (reference.dtype, candidate.dtype) else []
    return Level(None, "Reference ↔ candidate", comparison.status, comparison=comparison, notes=notes)


def _export_level(pipeline: Pipeline, exported: OnnxDecoder, run: Callable[..., Level], tell: Callable[[str], None]) -> Level:
    if pipeline.checkpoint is None:
        return not_run(1, "the checkpoint that export/manifest.json names is not here")
    tell("level 1: loading the checkpoint")
    return run(1, open_reference(pipeline.checkpoint, exported.dtype), exported)


def _surgery_level(pipeline: Pipeline, exported: OnnxDecoder, portable: OnnxDecoder | None, run: Callable[..., Level]) -> Level:
    """What surgery made of the exported graph, up to where it quantised it: level 5 says what that does."""
    if portable is None:
        return not_run(2, "surgery has written no portable graph")
    if portable.quantised is None:
        return run(2, exported, portable)
    if pipeline.unquantised is None:
        return not_run(2, "surgery has left no graph from before it quantised")
    unquantised = _opened(pipeline.unquantised, "portable, not yet quantised")
    if isinstance(unquantised, Broken):
        return failed(2, unquantised.reason)
    level = run(2, exported, unquantised)
    level.notes.append(f"The portable graph is quantised ({portable.quantised}); compared is what it was made of")
    return level


def _allowed(portable: OnnxDecoder) -> float:
    """Between onnxruntime and TensorRT, which computes bfloat16 as bfloat16."""
    return ROUNDED if portable.rounds else TOLERANCES[portable.dtype]


def _network_level(
    pipeline: Pipeline, portable: OnnxDecoder | None, run: Callable[..., Level], tell: Callable[[str], None]
) -> Level:
    if portable is None or pipeline.lowered is None:
        return not_run(3, "surgery has written no lowered graph")
    tell("level 3: TensorRT parses the lowered graph")
    try:
        network = open_network(pipeline.lowered, "TensorRT's network")
    except (NoTensorRT, NotEvaluated) as error:
        return not_run(3, str(error))
    except UserError as error:
        return failed(3, error)
    return run(3, portable, network, _allowed(portable))


def _engine_level(
    pipeline: Pipeline,
    portable: OnnxDecoder | None,
    scenarios: list[Scenario],
    run: Callable[..., Level],
    tell: Callable[[str], None],
) -> Level:
    if portable is None or pipeline.engine is None:
        return not_run(4, "no engine has been built")
    allowed = _allowed(portable)
    if pipeline.results:
        if pipeline.lowered is None:
            raise UserError(pipeline.results, "cannot be tied to a lowered graph, which is not here", "run surgery again")
        results: Results = read_results(pipeline.results, pipeline.portable, pipeline.lowered)
        level = run(4, portable, results, allowed, results.scenarios)
        level.notes += results.notes
        return level
    try:
        description = read_description(pipeline.engine.with_name("engine.json"))
        reason, expected, size = why_not(description), description["engine_bytes"], pipeline.engine.stat().st_size
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return failed(4, f"{pipeline.engine.parent}: what build wrote cannot be read ({type(error).__name__}: {error})")
    if size != expected:
        return failed(4, f"{pipeline.engine}: has {size} bytes, and was built with {expected}")
    if reason:
        return not_run(4, f"{reason}; --bundle makes a folder to run where one is, and --import takes its results")
    tell("level 4: loading the engine")
    engine = open_engine(pipeline.engine)
    fitting, others = [], []
    for scenario in scenarios:
        shapes = [step["tokens"].shape for step in scenario.steps]
        (fitting if all(takes(description, *shape) for shape in shapes) else others).append(scenario)
    level = run(4, portable, engine, allowed, fitting)
    for scenario in others:
        reason = "no profile of the engine allows its steps"
        level.comparison.scenarios.append(ScenarioResult(scenario.name, scenario.what, NOT_RUN, reason))
    engine.engine.save_runtime_cache()
    return level


def _encoder_levels(
    files: EncoderFiles, checkpoint: Path | None, tolerance: float | None, seed: int, progress: Progress
) -> Iterator[Level]:
    compared = compare_encoder(files, checkpoint, tolerance, seed)

    def check() -> Level:
        number, found = next(compared)
        title = f"Encoder: {TITLES[number]}"
        if isinstance(found, Comparison):
            return Level(number, title, found.status, comparison=found)
        if isinstance(found, Broken):
            return Level(number, title, FAILED, found.reason)
        return Level(number, title, NOT_RUN, found)

    for number in (1, 2, 3):
        progress.tell(f"level {number} of the encoder")
        yield progress.level(f"level {number}, encoder: {TITLES[number]}", check)


def scenarios_for(pipeline: Pipeline, graph: OnnxDecoder, seed: int) -> list[Scenario]:
    """What a graph of the pipeline is asked: its text where there is one, else random tokens."""
    _, ids, _ = _read_text(pipeline)
    source = text_tokens(ids, seed) if ids else random_tokens(graph.vocab, seed)
    return make_scenarios(source, graph.capacity, graph.trained_length, prefix=graph.prefix)


def token_level(pipeline: Pipeline, portable: OnnxDecoder, tokenizer: Tokenizer, ids: list[int]) -> Level:
    """Level 5; for a quantised graph also what the format costs."""
    reference = open_reference(pipeline.checkpoint)
    tokens = compare_tokens(reference, portable, tokenizer, ids, portable.dtype, portable.quantised)
    if portable.quantised and pipeline.unquantised:
        graphs = {"before": pipeline.unquantised, "quantised": pipeline.portable}
        tokens.cost = quantisation_cost(reference, graphs, portable.quantised, tokenizer, ids, tokens.readings[0])
    notes = [SHADOW_COPY_NOTE] if portable.dtype == TensorProto.BFLOAT16 else []
    return Level(5, TITLES[5], PASSED if tokens.passed else DIFFERENT, tokens=tokens, notes=notes)


def _read_text(pipeline: Pipeline) -> tuple[Tokenizer | None, list[int], str | None]:
    """The tokenizer and the text's tokens, or why there are none."""
    if pipeline.checkpoint is None:
        return None, [], "needs the checkpoint's tokenizer"
    try:
        tokenizer = open_tokenizer(pipeline.checkpoint)
    except UserError as error:
        return None, [], f"the checkpoint's tokenizer cannot be read ({error})"
    if pipeline.text is None:
        return tokenizer, [], "no text to read: give one with --text"
    ids = tokenizer.encode(pipeline.text.read_text(encoding="utf-8", errors="replace"))
    if len(ids) < 64:
        return tokenizer, [], f"the text is too short: {len(ids)} tokens"
    return tokenizer, ids, None


def _opened(path: Path | None, name: str) -> OnnxDecoder | Broken | None:
    if path is None:
        return None
    try:
        return open_graph(path, name)
    except UserError as error:
        return Broken(str(error) if str(path) in str(error) else f"{path}: {error}")

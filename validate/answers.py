"""What a difference means for answers about pictures: both models are asked the same about drawn pictures, and write greedily.

The candidate also reads the reference's answers token by token, so that its probabilities can be compared where the texts are the same.
Whether a model knows such pictures is its own affair: its answers are compared with the reference's, and shown beside the right ones.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from suture.core.errors import UserError
from suture.core.pictures import FEATURES, INSTRUCTION, PIXELS, VISION, with_pictures
from suture.models.architectures import open_checkpoint
from suture.models.drawn_pictures import random_scene
from suture.models.drawn_questions import MOST, questions
from suture.models.parts import part_named
from suture.models.tokenizer import open_tokenizer
from suture.runtime.graphs import open_embedding, open_graph
from suture.runtime.looking import Looker, size_of
from suture.runtime.networks import in_onnxruntime
from suture.runtime.placeholders import Placeholders
from suture.runtime.seen import Seen
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.level import Answered, AnswerResult, Level, failed, not_run
from suture.validate.pipeline import NOT_HERE, Pipeline
from suture.validate.reference import TorchReference, load_reference
from suture.validate.runners import SteppedModel, valid_logits
from suture.validate.tokens import LIMITS

TITLE = "Answers about drawn pictures"
PICTURES, ANSWER, SHOWN = 12, 32, 6  # pictures; tokens of an answer; of the pictures, those that the report shows


@dataclass
class Asked:
    """A picture with a question, and the ids that stand for it in both models."""

    picture: np.ndarray
    question: str
    right: str
    prompt: list[int] = field(default_factory=list)


def answers_level(pipeline: Pipeline, seed: int, tell: Callable[[str], None]) -> Level:
    """Level 5 of a model that answers about pictures: PyTorch in float32, its weights rounded to the graph's type, and the portable graphs."""
    parts = {files.part.name: files for files in pipeline.parts}
    vision, decoder = parts[VISION], pipeline.decoder
    if vision.portable is None or decoder.portable is None:
        return not_run(5, "surgery has not been run on all parts", TITLE)
    if pipeline.checkpoint is None:
        return not_run(5, NOT_HERE, TITLE)
    if INSTRUCTION in vision.part.inputs:
        return not_run(5, "its vision part reads the question, too, for which there is no tokenizer here", TITLE)
    try:
        tokenizer = open_tokenizer(pipeline.checkpoint)
    except UserError as error:
        return not_run(5, f"there is no tokenizer to ask with ({error})", TITLE)
    try:
        candidate = open_graph(decoder.portable, "portable")
        tell("level 5: loading the checkpoint")
        module = load_reference(open_checkpoint(pipeline.checkpoint), candidate.dtype)
        size = size_of(vision.part.inputs[PIXELS]["shape"])
        lookers = [Looker(pipeline.checkpoint, run, size) for run in (in_torch(module), in_onnxruntime(vision.portable))]
        seen = [Seen(embedding(module)), Seen(open_embedding(pipeline.embed))]
        asked = drawn(size, seed)
        for each in asked:
            ids = [to.add(*looker.features(Image.fromarray(each.picture))) for to, looker in zip(seen, lookers)]
            each.prompt = prompt(each.question, tokenizer, Placeholders(pipeline.checkpoint), ids[0])
        longest, room = max(len(each.prompt) for each in asked), candidate.longest
        if room is not None and room < longest + ANSWER:
            return not_run(5, f"a question and its answer take {longest + ANSWER} tokens, and the decoder {room}", TITLE)
        reference = TorchReference("PyTorch", candidate.dtype, module, seen[0])
        tell("level 5: answering")
        found = compare_answers(reference, replace(candidate, embed=seen[1]), tokenizer, asked)
    except UserError as error:
        return failed(5, error, TITLE)
    return Level(5, TITLE, PASSED if found.passed else DIFFERENT, answers=found)


def drawn(size: tuple[int, int], seed: int, count: int = PICTURES) -> list[Asked]:
    random, asked = np.random.default_rng([seed, 17]), []
    for number in range(count):
        scene = random_scene(random, *size, number % MOST + 1)
        ((question, right),) = questions(scene, random, 1)
        asked.append(Asked(scene.picture(*size), question, right))
    return asked


def compare_answers(reference: SteppedModel, candidate: SteppedModel, tokenizer, asked: list[Asked]) -> AnswerResult:
    prompts, stops = [each.prompt for each in asked], tokenizer.stop_ids(True)
    kl, agreed, theirs = _followed(reference, candidate, prompts, stops)
    texts = [[_text(row, tokenizer, stops) for row in theirs], answered(candidate, tokenizer, asked)]
    rows = [
        Answered(each.question, each.right, *pair, _png(each.picture) if number < SHOWN else None)
        for number, (each, pair) in enumerate(zip(asked, zip(*texts)))
    ]
    limits = LIMITS[candidate.dtype]
    return AnswerResult(
        reference.name, candidate.name, limits.mean_kl, limits.agreement, float(np.mean(kl)), float(np.mean(agreed)), rows
    )


def answered(model: SteppedModel, tokenizer, asked: list[Asked]) -> list[str]:
    """What it answers to each."""
    stops = tokenizer.stop_ids(True)
    return [_text(row, tokenizer, stops) for row in _followed(model, None, [each.prompt for each in asked], stops)[2]]


def _followed(
    model: SteppedModel, other: SteppedModel | None, prompts: list[list[int]], stops: set[int]
) -> tuple[list[float], list[bool], list[list[int]]]:
    """What `model` answers, and where `other` reads the same: by token how far its probabilities are off, in nats, and whether it would
    have chosen the same."""
    models = [each for each in (model, other) if each is not None]
    decoders = [each.decoder(len(prompts)) for each in models]
    counts, alpha = np.array([len(prompt) for prompt in prompts]), np.ones(len(prompts), np.float32)
    tokens = np.zeros((len(prompts), counts.max()), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    kl, agreed, answers, open_rows = [], [], [[] for _ in prompts], np.ones(len(prompts), bool)
    for _ in range(ANSWER):
        logits = [torch.from_numpy(valid_logits(each.step(tokens, counts, alpha), counts, last=True)) for each in decoders]
        logs = [torch.log_softmax(each.double(), -1) for each in logits]
        best = logs[0].argmax(-1).numpy()
        if other is not None:
            kl += (logs[0].exp() * (logs[0] - logs[1])).sum(-1).numpy()[open_rows].tolist()
            agreed += (logs[1].argmax(-1).numpy() == best)[open_rows].tolist()
        for row in np.flatnonzero(open_rows):
            answers[row].append(int(best[row]))
        open_rows &= ~np.isin(best, list(stops))
        if not open_rows.any():
            break
        tokens, counts = best[:, None], np.ones(len(prompts), np.int64)
    return kl, agreed, answers


def prompt(question: str, tokenizer, placeholders: Placeholders, picture: list[int]) -> list[int]:
    """As a chat where the checkpoint has a template for it, else as plain text."""
    try:
        ids = tokenizer.chat(with_pictures([{"role": "user", "content": question}], 1))
    except (UserError, ValueError, TypeError):
        ids = tokenizer.encode(placeholders.text(question, tokenizer, 1))
    return placeholders.put(ids, [picture], "the chat template")


def in_torch(module: torch.nn.Module) -> Callable[[dict], dict]:
    vision = part_named(module, VISION).module

    @torch.inference_mode()
    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {FEATURES: vision(torch.from_numpy(inputs[PIXELS])).numpy()}

    return run


def embedding(module: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    table = part_named(module, "embed").module

    @torch.inference_mode()
    def embed(ids: np.ndarray) -> np.ndarray:
        return table(torch.from_numpy(ids)).numpy()

    return embed


def _text(ids: list[int], tokenizer, stops: set[int]) -> str:
    return tokenizer.decode([token for token in ids if token not in stops and token < tokenizer.size]).strip()


def _png(picture: np.ndarray) -> str:
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"

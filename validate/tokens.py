"""What a difference means for text: both decoders read the same held-out text, and continue the same prompts."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

from suture.core.signature import ntk_alpha
from suture.core.step_inputs import Embed
from suture.core.tensors import tensor_bytes
from suture.core.weights import load_graph
from suture.models.tokenizer import Tokenizer
from suture.runtime.graphs import open_graph
from suture.validate.runners import SteppedModel, valid_logits

CHUNK = 128  # tokens of a window read in one step
NEW_TOKENS = 32
PROMPT_LENGTHS = (40, 16, 29, 24)


@dataclass(frozen=True)
class TokenLimits:
    """What still counts as the same model."""

    mean_kl: float  # nats
    agreement: float  # share of tokens where both would choose the same next token
    bits_change: float  # of bits per byte, relative


# For 16-bit types these allow rounding every weight and activation; a damaged layer exceeds them by far.
LIMITS = {
    TensorProto.FLOAT: TokenLimits(mean_kl=1e-6, agreement=0.999, bits_change=1e-4),
    TensorProto.FLOAT16: TokenLimits(mean_kl=2e-3, agreement=0.98, bits_change=5e-3),
    TensorProto.BFLOAT16: TokenLimits(mean_kl=2e-3, agreement=0.98, bits_change=5e-3),
}


# What a format may cost; docs/quantisation.md has what each does cost on tiny-qwen. A scale that is off exceeds these, too.
QUANTISED_LIMITS = {
    "int8": TokenLimits(mean_kl=5e-3, agreement=0.96, bits_change=5e-3),
    "int8-smoothquant": TokenLimits(mean_kl=0.05, agreement=0.9, bits_change=0.015),
    "fp8": TokenLimits(mean_kl=0.05, agreement=0.9, bits_change=0.015),
    "int4": TokenLimits(mean_kl=0.15, agreement=0.8, bits_change=0.05),
    "int4-awq": TokenLimits(mean_kl=0.15, agreement=0.8, bits_change=0.05),
    "cache": TokenLimits(mean_kl=0.01, agreement=0.95, bits_change=5e-3),
}


@dataclass
class Reading:
    """Windows of one length, read token by token against the text."""

    name: str
    windows: int
    window: int  # tokens
    mean_kl: float | None  # nats, of candidate from reference; None where a logit is not a number
    kl_99: float | None  # 99th percentile over tokens
    agreement: float
    reference_bits: float | None  # per byte; None as above
    candidate_bits: float | None
    kl_by_position: list[float] = field(default_factory=list)  # mean over windows
    bits_by_position: dict[str, list[float]] = field(default_factory=dict)  # per token, mean over windows, by model
    kl_percentiles: list[float] = field(default_factory=list)  # 0 to 100, over tokens

    def within(self, limits: TokenLimits) -> bool:
        return bool(
            self.mean_kl is not None
            and self.candidate_bits is not None
            and self.reference_bits  # neither absent nor 0
            and self.mean_kl <= limits.mean_kl
            and self.agreement >= limits.agreement
            and abs(self.candidate_bits / self.reference_bits - 1) <= limits.bits_change
        )


@dataclass
class Continuation:
    """Greedy decoding from prompts of the text, each model on its own tokens. Reported, without a limit: after a near tie
    the two texts stay different."""

    prompts: int
    new_tokens: int
    identical: int
    agreeing_tokens: float  # mean over prompts, up to the first difference
    example: dict[str, str] = field(default_factory=dict)  # the first prompt, then its continuation by model


@dataclass
class QuantisingCost:
    """What quantising costs and saves: the graph from before it reads the same text. Reported, without a limit."""

    format: str
    before: Reading
    bytes: dict[str, int]  # of weights, "before" and "quantised"


@dataclass
class TokenResult:
    reference: str
    candidate: str
    limits: TokenLimits
    readings: list[Reading]
    continuation: Continuation
    cost: QuantisingCost | None = None

    @property
    def passed(self) -> bool:
        return all(reading.within(self.limits) for reading in self.readings)


def compare_tokens(
    reference: SteppedModel,
    candidate: SteppedModel,
    tokenizer: Tokenizer,
    ids: list[int],
    dtype: int,
    quantised: str | None = None,
) -> TokenResult:
    """Both models on the text `ids`. Windows no longer than the trained length, and for models with dynamic NTK also
    windows twice as long, each read as one prompt. `dtype` and the format that it is `quantised` to, the candidate's,
    set the limits."""
    limits = QUANTISED_LIMITS[re.match(r"[\w-]+", quantised)[0]] if quantised else LIMITS[dtype]
    capacity = candidate.capacity or len(ids)
    trained = candidate.trained_length
    window = min(trained or 512, capacity - len(candidate.prefix), len(ids))
    readings = [read("text", reference, candidate, tokenizer, ids, window, windows=8)]
    if trained and min(capacity, len(ids)) >= 2 * trained:
        readings.append(read("text beyond the trained length", reference, candidate, tokenizer, ids, 2 * trained, windows=2))
    return TokenResult(reference.name, candidate.name, limits, readings, continue_both(reference, candidate, tokenizer, ids))


def quantisation_cost(
    reference: SteppedModel,
    graphs: dict[str, Path],
    quantised: str,
    tokenizer: Tokenizer,
    ids: list[int],
    like: Reading,
    embed: Embed | None = None,
) -> QuantisingCost:
    """Of the format `quantised`; `graphs`: files "before" and "quantised"; `like`: what the latter read."""
    graph = replace(open_graph(graphs["before"], "before"), embed=embed)
    before = read(like.name, reference, graph, tokenizer, ids, like.window, like.windows)
    tensors = {name: load_graph(path).graph.initializer for name, path in graphs.items()}
    return QuantisingCost(quantised, before, {name: sum(map(tensor_bytes, each)) for name, each in tensors.items()})


def read(
    name: str, reference: SteppedModel, candidate: SteppedModel, tokenizer: Tokenizer, ids: list[int], window: int, windows: int
) -> Reading:
    """Reads up to `windows` windows, spread over the text, in one batch. Only a step's logits are held at a time. Where a
    step's tokens see each other, which would give the next one away, each is a step of its own."""
    starts = np.unique(np.linspace(0, len(ids) - window, min(windows, len(ids) // window)).astype(int))
    tokens_BS = np.array([ids[start : start + window] for start in starts], np.int64)
    models = (reference, candidate)
    decoders = [model.decoder(len(starts)) for model in models]
    alpha = _alpha([window] * len(starts), candidate.trained_length)
    width = 1 if any(model.last_only or model.bidirectional for model in models) else CHUNK
    prefix = np.tile(np.array(candidate.prefix, np.int64), (len(starts), 1))
    kl, agreement, bits = [], [], {model.name: [] for model in models}
    for start in range(0, window - 1, width):
        step = tokens_BS[:, start : min(start + width, window - 1)]
        targets = torch.from_numpy(tokens_BS[:, start + 1 : start + 1 + step.shape[1], None])
        fed = step if start else np.concatenate([prefix, step], axis=1)
        counts = np.full(len(starts), fed.shape[1])
        logits = [decoder.step(fed, counts, alpha)[:, -step.shape[1] :] for decoder in decoders]
        logits = [torch.from_numpy(each).double() for each in logits]
        ours, theirs = (torch.log_softmax(each, dim=-1) for each in logits)
        kl.append((ours.exp() * (ours - theirs)).sum(-1))
        agreement.append(ours.argmax(-1) == theirs.argmax(-1))
        for model, log_probabilities in zip(models, (ours, theirs)):
            bits[model.name].append(-log_probabilities.gather(-1, targets)[..., 0] / np.log(2))
    kl, agreement = torch.cat(kl, dim=1), torch.cat(agreement, dim=1)
    bits = {model: torch.cat(parts, dim=1) for model, parts in bits.items()}
    size = sum(len(tokenizer.decode_bytes(row[1:])) for row in tokens_BS.tolist())
    reference_bits, candidate_bits = (_number(bits[model.name].sum() / size) for model in models)
    return Reading(
        name=name,
        windows=len(starts),
        window=window,
        mean_kl=_number(kl.mean()),
        kl_99=_number(kl.flatten().quantile(0.99)),
        agreement=float(agreement.double().mean()),
        reference_bits=reference_bits,
        candidate_bits=candidate_bits,
        kl_by_position=[_number(value) for value in kl.mean(0)],
        bits_by_position={model: [_number(value) for value in each.mean(0)] for model, each in bits.items()},
        kl_percentiles=[_number(value) for value in kl.flatten().quantile(torch.linspace(0, 1, 101, dtype=kl.dtype))],
    )


def continue_both(reference: SteppedModel, candidate: SteppedModel, tokenizer: Tokenizer, ids: list[int]) -> Continuation:
    places = np.linspace(0, max(len(ids) - max(PROMPT_LENGTHS), 0), len(PROMPT_LENGTHS)).astype(int)
    prompts = [[*candidate.prefix, *ids[place : place + length]] for place, length in zip(places, PROMPT_LENGTHS)]
    room = (candidate.capacity or 1 << 20) - max(map(len, prompts))
    new_tokens = min(NEW_TOKENS, room)
    texts = [greedy(model, prompts, new_tokens, candidate.trained_length) for model in (reference, candidate)]
    agreeing = (np.cumprod(texts[0] == texts[1], axis=1)).sum(axis=1)
    example = {"prompt": tokenizer.decode(prompts[0][len(candidate.prefix) :])}
    for model, text in zip((reference, candidate), texts):  # a vocabulary is padded: not every id is a token
        example[model.name] = tokenizer.decode([token for token in text[0].tolist() if token < tokenizer.size])
    return Continuation(len(prompts), new_tokens, int((agreeing == new_tokens).sum()), float(agreeing.mean()), example)


def greedy(model: SteppedModel, prompts: list[list[int]], new_tokens: int, trained_length: int | None) -> np.ndarray:
    """int64 [prompts, new_tokens]: the likeliest token after each, prompts of any lengths in one batch."""
    decoder = model.decoder(len(prompts))
    counts = np.array([len(prompt) for prompt in prompts])
    alpha = _alpha(counts.tolist(), trained_length)
    tokens = np.zeros((len(prompts), counts.max()), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    chosen = []
    for _ in range(new_tokens):
        best = valid_logits(decoder.step(tokens, counts, alpha), counts, last=True).argmax(-1)
        chosen.append(best)
        tokens, counts = best[:, None], np.ones(len(prompts), np.int64)
    return np.stack(chosen, axis=1)


def _alpha(lengths: list[int], trained_length: int | None) -> np.ndarray:
    return np.array([ntk_alpha(n, trained_length) if trained_length else 1.0 for n in lengths], np.float32)


def _number(value: torch.Tensor) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(f"{float(value):.6g}") if torch.isfinite(value) else None

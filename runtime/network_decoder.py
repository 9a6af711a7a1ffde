"""The parsed network as a decoder that suture.validate.compare steps through its scenarios: level 3."""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from suture.core.layerwise import is_large, with_fewer_slots
from suture.core.network.dtypes import TORCH, to_torch
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import parse
from suture.core.network.runner import to_numpy
from suture.core.signature import Signature, find_signature
from suture.core.step_inputs import Embed, step_values
from suture.core.weights import load_graph
from suture.runtime.decoders import Decoder, GrowingDecoder, OfSignature, StaticDecoder, made_up_constants
from suture.runtime.graphs import refuse_unknown_inputs


@dataclass(frozen=True)
class NetworkModel(OfSignature):
    """What TensorRT's parser made of an ONNX file, as a suture.validate.runners.SteppedModel. bfloat16 is computed as bfloat16."""

    evaluate: Evaluator = field(repr=False)
    embed: Embed | None = field(repr=False, default=None)  # the model's own, where it takes embeddings

    @property
    def vocab(self) -> int:
        return self.evaluate.network.tensors[self.signature.logits].shape[-1]

    def decoder(self, batch: int) -> Decoder:
        if self.signature.static:
            session = NetworkSession(self.evaluate, self.signature, batch)
            return StaticDecoder(session, self.signature, embed=self.embed)
        empty = _empty(self.evaluate, self.signature, batch, slots=0)
        return GrowingDecoder(self._forward, [_cache_array(cache) for cache in empty.values()])

    def _forward(self, tokens, positions, mask, pasts, alpha):
        names, declared = self.signature, self.evaluate.network.tensors
        feeds = step_values(names, tokens, positions, alpha, embed=self.embed) | ({names.mask: mask} if names.mask else {})
        feeds |= {cache.past: to_torch(past, TORCH[declared[cache.past].dtype]) for cache, past in zip(names.caches, pasts)}
        feeds |= _constant(self.evaluate, names, len(tokens))
        values = self.evaluate(feeds)
        return to_numpy(values[names.logits]), [_cache_array(values[cache.present]) for cache in names.caches]


class NetworkSession:
    """A batch over static caches, all rows of it at a time; as suture.runtime.decoders.DecoderSession, for the evaluator."""

    def __init__(self, evaluate: Evaluator, signature: Signature, batch: int):
        self.evaluate, self.signature = evaluate, signature
        self.caches = _empty(evaluate, signature, batch, signature.capacity)
        self.crossed = _constant(evaluate, signature, batch)

    def advance(self, feeds: dict[str, np.ndarray], rows: slice) -> torch.Tensor:
        values = self.evaluate({**feeds, **self.caches, **self.crossed})
        self.caches = {cache.past: values[cache.present] for cache in self.signature.caches}
        return values[self.signature.logits]


def open_network(path: Path, name: str | None = None, device: str | None = None) -> NetworkModel:
    """Parses an ONNX decoder graph, a large one with few cache slots, as onnxruntime runs it. Raises UserError where it is
    none, or TensorRT's parser or the evaluator refuse."""
    graph = load_graph(path)
    graph = with_fewer_slots(graph) if is_large(graph) else graph
    signature = find_signature(graph, path)
    model = NetworkModel(name or f"TensorRT's network of {path.name}", signature, Evaluator(parse(path, graph), device))
    refuse_unknown_inputs(model.evaluate.network.inputs, signature, path)
    return model


def _empty(evaluate: Evaluator, signature: Signature, batch: int, slots: int) -> dict[str, torch.Tensor]:
    declared = {cache.past: evaluate.network.tensors[cache.past] for cache in signature.caches}
    return {
        name: torch.zeros(batch, tensor.shape[1], slots, tensor.shape[3]).to(TORCH[tensor.dtype])
        for name, tensor in declared.items()
    }


def _cache_array(cache: torch.Tensor) -> np.ndarray:
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return to_numpy(cache)


def _constant(evaluate: Evaluator, signature: Signature, batch: int) -> dict[str, torch.Tensor]:
    declared = [evaluate.network.tensors[cache.past] for cache in signature.encoder_caches]
    made = made_up_constants(signature, [tensor.shape[1:] for tensor in declared], batch, np.float32)
    types = {name: TORCH[evaluate.network.tensors[name].dtype] for name in made}
    return {name: torch.from_numpy(value).to(types[name]) for name, value in made.items()}

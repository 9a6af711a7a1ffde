"""The parsed network as a decoder that validate.compare steps through its scenarios: level 3."""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from contracts.signature import Signature, find_signature
from contracts.weights import load_graph
from runtime.decoders import NOISE_SEED, Decoder, GrowingDecoder, OfSignature, made_up_constants, positions_of
from runtime.graphs import refuse_unknown_inputs
from runtime.layerwise import is_large, with_fewer_slots
from validate.network.dtypes import TORCH, to_torch
from validate.network.evaluate import Evaluator
from validate.network.parse import parse
from validate.network.runner import to_numpy


@dataclass(frozen=True)
class NetworkModel(OfSignature):
    """What TensorRT's parser made of an ONNX file, as a validate.runners.Model. bfloat16 is computed as bfloat16."""

    name: str
    signature: Signature
    evaluate: Evaluator = field(repr=False)

    @property
    def vocab(self) -> int:
        return self.evaluate.network.tensors[self.signature.logits].shape[-1]

    def decoder(self, batch: int) -> Decoder:
        if self.signature.static:
            return StaticNetworkDecoder(self.evaluate, self.signature, batch)
        empty = [_cache_array(cache) for cache in _caches(self.evaluate, self.signature, batch, slots=0)]
        return GrowingDecoder(self._forward, empty)

    def _forward(self, tokens, positions, mask, pasts, alpha):
        names, declared = self.signature, self.evaluate.network.tensors
        feeds = {names.tokens: tokens, names.positions: positions, names.mask: mask, names.ntk_alpha: alpha}
        feeds |= {cache.past: to_torch(past, TORCH[declared[cache.past].dtype]) for cache, past in zip(names.caches, pasts)}
        feeds |= _constant(self.evaluate, names, len(tokens))
        values = self.evaluate({name: value for name, value in feeds.items() if name is not None})
        return to_numpy(values[names.logits]), [_cache_array(values[cache.present]) for cache in names.caches]


class StaticNetworkDecoder:
    """A cache of fixed capacity that begins full of noise, as runtime.decoders.StaticDecoder does for onnxruntime."""

    def __init__(self, evaluate: Evaluator, signature: Signature, batch: int):
        self.evaluate, self.signature = evaluate, signature
        self.buffers = _caches(evaluate, signature, batch, signature.capacity)
        self.lengths = np.zeros(batch, np.int64)

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        names = self.signature
        feeds = {
            names.tokens: tokens_BS,
            names.positions: positions_of(self.lengths, counts, tokens_BS.shape[1]),
            names.write_indices: self.lengths,
            names.sequence_lengths: counts,
            names.ntk_alpha: alpha,
        }
        feeds |= {cache.past: buffer for cache, buffer in zip(names.caches, self.buffers)}
        feeds |= _constant(self.evaluate, names, len(tokens_BS))
        values = self.evaluate({name: value for name, value in feeds.items() if name is not None})
        self.buffers = [values[cache.present] for cache in names.caches]
        self.lengths = self.lengths + counts
        return to_numpy(values[names.logits])

    def caches(self) -> list[np.ndarray]:
        return [to_numpy(buffer) for buffer in self.buffers]


def open_network(path: Path, name: str | None = None, device: str | None = None) -> NetworkModel:
    """Parses an ONNX decoder graph, a large one with few cache slots, as onnxruntime runs it. Raises UserError where it is
    none, or TensorRT's parser or the evaluator refuse."""
    graph = load_graph(path)
    graph = with_fewer_slots(graph) if is_large(graph) else graph
    signature = find_signature(graph, path)
    model = NetworkModel(name or f"TensorRT's network of {path.name}", signature, Evaluator(parse(path, graph), device))
    refuse_unknown_inputs(model.evaluate.network.inputs, signature, path)
    return model


def _caches(evaluate: Evaluator, signature: Signature, batch: int, slots: int) -> list[torch.Tensor]:
    noise = np.random.default_rng(NOISE_SEED)
    caches = []
    for cache in signature.caches:
        declared = evaluate.network.tensors[cache.past]
        shape = (batch, declared.shape[1], slots, declared.shape[3])
        caches.append(torch.from_numpy(noise.standard_normal(shape, np.float32)).to(TORCH[declared.dtype]))
    return caches


def _cache_array(cache: torch.Tensor) -> np.ndarray:
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return to_numpy(cache)


def _constant(evaluate: Evaluator, signature: Signature, batch: int) -> dict[str, torch.Tensor]:
    declared = [evaluate.network.tensors[cache.past] for cache in signature.encoder_caches]
    made = made_up_constants(signature, [tensor.shape[1:] for tensor in declared], batch, np.float32)
    types = {name: TORCH[evaluate.network.tensors[name].dtype] for name in made}
    return {name: torch.from_numpy(value).to(types[name]) for name, value in made.items()}

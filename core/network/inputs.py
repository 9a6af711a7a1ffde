"""Inputs for a graph of which nothing is known but its signature.

Language models get sensible ones: tokens below the vocabulary's size, positions that follow what is in the cache,
caches full of noise (so that a graph that looks at a slot which nobody wrote shows it), masks that are causal.
Other graphs get normal noise, and small integers that can be indices into anything.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from suture.core.cpm_inputs import made_up
from suture.core.errors import UserError
from suture.core.signature import Signature, find_signature

ROWS = 2
NEGATIVE = {"float16": -65504.0, "float32": -3.0e38, "bfloat16": -3.0e38}  # what an additive mask hides with


@dataclass(frozen=True)
class Feeds:
    name: str
    values: dict[str, np.ndarray]


def make_feeds(model: onnx.ModelProto, seed: int = 0) -> list[Feeds]:
    """Several sets of inputs: prompt, later chunk at ragged places and decode for a language model, else one of noise."""
    rng = np.random.default_rng(seed)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    try:
        signature = find_signature(model)
    except UserError:
        return [Feeds("random inputs", _noise(inputs, rng))]
    room = signature.capacity or 24
    steps = (("prompt", 0, min(8, room)), ("chunk", room // 3, min(4, room // 3)), ("decode", room // 2, 1))
    return [Feeds(name, _step(model, signature, inputs, past, tokens, rng)) for name, past, tokens in steps if tokens > 0]


def read_feeds(path: Path) -> list[Feeds]:
    """Inputs from a file of numpy arrays by name (.npz)."""
    if not zipfile.is_zipfile(path):
        raise UserError(path, "is no .npz file of inputs", "write one with numpy.savez(path, name=array, ...)")
    with np.load(path, allow_pickle=False) as arrays:
        try:
            return [Feeds(path.name, dict(arrays))]
        except ValueError:  # an array of Python objects
            raise UserError(path, "holds something else than plain arrays", "write numeric arrays") from None


def _step(model, signature: Signature, inputs, past: int, tokens: int, rng) -> dict[str, np.ndarray]:
    """One step of `tokens` tokens after `past`; in a static cache the rows stand at different places."""
    vocabulary = next(_sizes(value)[-1] for value in model.graph.output if value.name == signature.logits)
    starts = np.full(ROWS, past)
    if signature.static and past:
        starts = past - np.arange(ROWS)
    positions = starts[:, None] + np.arange(tokens)
    slots = signature.capacity if signature.static else past + tokens
    feeds = {}
    for value in inputs:
        name, dtype, sizes = value.name, _dtype(value), _sizes(value)
        if name == signature.tokens:
            array = rng.integers(0, vocabulary if isinstance(vocabulary, int) else 100, (ROWS, tokens))
        elif name == signature.positions:
            array = positions if len(sizes) == 2 else np.broadcast_to(positions, (sizes[0], ROWS, tokens))
        elif name == signature.write_indices:
            array = starts
        elif name == signature.sequence_lengths:
            array = np.full(ROWS, tokens)
        elif name in signature.layout:
            array = made_up((name,), ROWS, signature.capacity)[name]
        elif name == signature.ntk_alpha:
            array = 1 + 2 * np.arange(ROWS)
        elif name == signature.mask and len(sizes) == 4:
            allowed = np.arange(slots) <= positions[:, None, :, None]
            array = allowed if dtype.kind == "b" else np.where(allowed, 0.0, NEGATIVE[dtype.name])
        elif name == signature.mask:
            array = np.ones((ROWS, slots))
        elif any(name == cache.past for cache in signature.caches):
            shape = [ROWS, sizes[1], signature.capacity if signature.static else past, sizes[3]]
            array = rng.standard_normal([size if isinstance(size, int) else ROWS for size in shape])
        else:
            array = _noise([value], rng)[name]
        feeds[name] = np.ascontiguousarray(array).astype(dtype)
    return feeds


def _noise(inputs, rng) -> dict[str, np.ndarray]:
    """A dimension's name means one length everywhere; unnamed ones are ROWS in front, 4 elsewhere."""
    lengths: dict[str, int] = {}
    feeds = {}
    for value in inputs:
        shape = []
        for axis, size in enumerate(_sizes(value)):
            unnamed = ROWS if axis == 0 else 4
            shape.append(size if isinstance(size, int) else lengths.setdefault(size, unnamed) if size else unnamed)
        dtype = _dtype(value)
        if dtype.kind == "b":
            array = rng.random(shape) < 0.7
        elif dtype.kind in "iu":
            array = rng.integers(0, 2, shape)
        else:
            array = rng.standard_normal(shape)
        feeds[value.name] = np.asarray(array).astype(dtype)
    return feeds


def _sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)

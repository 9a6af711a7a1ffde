"""Optimisation profiles: for which shapes an engine is made, from what the graph's inputs are for.

decode    one token a sequence: the shape that most steps have, and for which TensorRT has its fastest attention kernel
prompt    up to --max-prompt tokens a sequence
any       both in one

Each profile fuses constant weights for itself, and what two fuse differently the engine holds twice. Of the graphs that
surgery writes that is nothing: measured, two layers of Qwen-7B are 3,302 MB with two profiles and 3,301 MB with one. In one
profile for both, decoding pays for the prompts' attention, which copies the whole cache at each step.
"""

from dataclasses import dataclass

import onnx

from suture.core.errors import UserError
from suture.core.signature import Signature

BATCH, SEQUENCE = "batch", "sequence"  # the names of these dimensions, in graphs that are no decoders
MOST_TOKENS = 512  # of a sequence in one step, where nobody says it
Range = tuple[int, int, int]  # smallest, the one to optimise for, largest


@dataclass(frozen=True)
class Profile:
    """Shapes of every input with a dynamic dimension: (smallest, the one to optimise for, largest)."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def make_profiles(
    proto: onnx.ModelProto, signature: Signature | None, *, split: bool, batch: int, prompt: int | None, past: int
) -> tuple[Profile, ...]:
    """The profiles of a graph: none if all its shapes are fixed.

    batch: most sequences; prompt: most tokens a sequence gets in one step (None: 512 or the capacity, if that is
    less); past: most tokens in a growing cache. Raises UserError for a dynamic input that is no part of a decoder.
    """
    dynamic = dynamic_inputs(proto)
    if not dynamic:
        return ()
    if signature is None:
        named = {BATCH: (1, 1, batch), SEQUENCE: (1, prompt or MOST_TOKENS, prompt or MOST_TOKENS)}
        return (Profile("any", {value.name: _shape_range(value, named) for value in dynamic}),)
    capacity = signature.capacity if signature.static else None
    if capacity == -1:
        raise UserError(signature.caches[0].past, "a static cache without a fixed capacity", "run surgery --capacity N")
    if capacity and prompt and prompt > capacity:
        raise UserError(f"--max-prompt {prompt}", f"the cache has {capacity} slots", "give at most that many")
    prompt = prompt or min(MOST_TOKENS, capacity or MOST_TOKENS)

    batches, half = (1, 1, batch), (past + 1) // 2
    steps = {  # sequence, past, past + sequence
        "decode": ((1, 1, 1), (1, half, past), (2, half + 1, past + 1)),
        "prompt": ((1, prompt, prompt), (0, 0, past), (1, prompt, past + prompt)),
        "any": ((1, 1, prompt), (0, half, past), (1, half + 1, past + prompt)),
    }
    profiles = []
    for name in ("decode", "prompt") if split else ("any",):
        sequence, cached, total = steps[name]
        ranges = _ranges(proto, signature, batches, sequence, cached, total)
        profiles.append(Profile(name, {value.name: _shape_range(value, ranges) for value in dynamic}))
    return tuple(profiles)


def dynamic_inputs(proto: onnx.ModelProto, but: tuple[str, ...] = ()) -> list[onnx.ValueInfoProto]:
    """Inputs with a dimension that is not fixed, if it has another name than those in `but`."""
    return [
        value
        for value in proto.graph.input
        if any(not dim.HasField("dim_value") and dim.dim_param not in but for dim in _dims(value))
    ]


def _ranges(
    proto: onnx.ModelProto, signature: Signature, batch: Range, sequence: Range, past: Range, total: Range
) -> dict[str | tuple[str, int], Range]:
    """Ranges by place (input, axis) and, for inputs that the signature does not know, by the name of the dimension."""
    places: dict[str | tuple[str, int], Range] = {}
    rows = 0 if signature.position_rows is None else 1
    for name, first in ((signature.tokens, 0), (signature.positions, rows)):
        places |= {(name, first): batch, (name, first + 1): sequence}
    for name in (signature.write_indices, signature.sequence_lengths, signature.ntk_alpha):
        places[name, 0] = batch
    if signature.mask and len(_dims(_input(proto, signature.mask))) == 2:
        places |= {(signature.mask, 0): batch, (signature.mask, 1): total}
    for cache in signature.caches:
        places |= {(cache.past, 0): batch, (cache.past, 2): past}
    for value in proto.graph.input:
        for axis, dim in enumerate(_dims(value)):
            if dim.dim_param and (value.name, axis) in places:
                places.setdefault(dim.dim_param, places[value.name, axis])
    return places


def _shape_range(value: onnx.ValueInfoProto, ranges: dict) -> tuple[tuple[int, ...], ...]:
    dims = []
    for axis, dim in enumerate(_dims(value)):
        if dim.HasField("dim_value"):
            dims.append((dim.dim_value,) * 3)
        elif (value.name, axis) in ranges:
            dims.append(ranges[value.name, axis])
        elif dim.dim_param in ranges:
            dims.append(ranges[dim.dim_param])
        else:
            raise UserError(
                f"input {value.name}",
                f"its dimension {axis} ({dim.dim_param or 'unnamed'}) is dynamic, and no decoder's input has it",
                "fix its size in the graph",
            )
    return tuple(zip(*dims))


def _input(proto: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    return next(value for value in proto.graph.input if value.name == name)


def _dims(value: onnx.ValueInfoProto):
    return value.type.tensor_type.shape.dim

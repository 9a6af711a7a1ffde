"""Optimisation profiles: for which shapes an engine is made, from what the graph's inputs are for.

decode    one token a sequence: the shape that most steps have, and for which TensorRT has its fastest attention kernel
prompt    up to --max-prompt tokens a sequence
any       both in one; of a graph without a KV cache, and where --shape is given, the only one (build/ranges.py)

Each profile fuses constant weights for itself, and what two fuse differently the engine holds twice. Of the graphs that
surgery writes that is nothing: measured, two layers of Qwen-7B are 3,302 MB with two profiles and 3,301 MB with one. In one
profile for both, decoding pays for the prompts' attention, which copies the whole cache at each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from suture.build.ranges import Range, default_ranges, given_ranges
from suture.core.errors import UserError
from suture.core.shapes import OPTION, ShapeRange
from suture.core.signature import Signature


@dataclass(frozen=True)
class Profile:
    """Shapes of every input with a dynamic dimension: (smallest, the one to optimise for, largest)."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def make_profiles(
    proto: onnx.ModelProto,
    signature: Signature | None,
    *,
    split: bool,
    batch: int,
    prompt: int | None,
    past: int,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> tuple[Profile, ...]:
    """The profiles of a graph: none if all its shapes are fixed.

    batch: most sequences; prompt: most tokens a sequence gets in one step (None: 512 or the capacity, if that is
    less); past: most tokens in a growing cache; shapes: ranges of some inputs, which the others' dimensions of the same
    names follow. Raises UserError for a dimension of which nothing says what it is for.
    """
    dynamic = dynamic_inputs(proto)
    if not dynamic:
        return ()
    given = given_ranges(proto, shapes or {})
    if signature is None:
        whole = all((value.name, axis) in given for value in dynamic for axis in _dynamic_axes(value))
        ranges = given if whole else default_ranges(proto, batch, prompt) | given
        return (Profile("any", {value.name: _shape_range(value, ranges) for value in dynamic}),)
    capacity = signature.capacity if signature.static else None
    if capacity == -1:
        raise UserError(signature.caches[0].past, "a static cache without a fixed capacity", "run surgery --capacity N")
    if capacity and prompt and prompt > capacity:
        raise UserError(f"--max-prompt {prompt}", f"the cache has {capacity} slots", "give at most that many")
    prompt = prompt or min(512, capacity or 512)

    batches, half = (1, 1, batch), (past + 1) // 2
    steps = {  # sequence, past, past + sequence
        "decode": ((1, 1, 1), (1, half, past), (2, half + 1, past + 1)),
        "prompt": ((1, prompt, prompt), (0, 0, past), (1, prompt, past + prompt)),
        "any": ((1, 1, prompt), (0, half, past), (1, half + 1, past + prompt)),
    }
    if given:
        sequence, cached, _ = steps["any"]
        batches, sequence = (given.get((signature.tokens, axis), usual) for axis, usual in enumerate((batches, sequence)))
        cached = given.get((signature.caches[0].past, 2), cached)
        steps["any"] = sequence, cached, tuple(map(sum, zip(sequence, cached)))
        if capacity and sequence[2] > capacity:
            wrong = f"{sequence[2]} tokens in one step, and the cache has {capacity} slots"
            raise UserError(f"{OPTION} {signature.tokens}", wrong, "give at most that many")
    profiles = []
    for name in ("decode", "prompt") if split and not given else ("any",):
        sequence, cached, total = steps[name]
        ranges = _ranges(proto, signature, batches, sequence, cached, total) | given
        profiles.append(Profile(name, {value.name: _shape_range(value, ranges) for value in dynamic}))
    return tuple(profiles)


def name_apart(proto: onnx.ModelProto, profiles: tuple[Profile, ...]) -> bool:
    """Gives inputs' dimensions of one name that the profiles have apart names of their own, in place; says whether there
    were any. TensorRT takes one name for one size, and exporters write one for a step's tokens and those with the cache's."""
    places: dict[str, list] = {}
    for value in proto.graph.input:
        for axis in _dynamic_axes(value):
            sizes = [
                [shape[axis] for shape in profile.shapes[value.name]] for profile in profiles if value.name in profile.shapes
            ]
            places.setdefault(_dims(value)[axis].dim_param, []).append((sizes, value, axis))
    apart = [found for name, found in places.items() if name and any(sizes != found[0][0] for sizes, _, _ in found)]
    for _, value, axis in (place for found in apart for place in found):
        _dims(value)[axis].dim_param = f"{value.name}[{axis}]"
    return bool(apart)


def dynamic_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs with a dimension that is not fixed."""
    return [value for value in proto.graph.input if _dynamic_axes(value)]


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
                f"give {OPTION} {value.name}=min,opt,max, or fix its size in the graph",
            )
    return tuple(zip(*dims))


def _dynamic_axes(value: onnx.ValueInfoProto) -> list[int]:
    return [axis for axis, dim in enumerate(_dims(value)) if not dim.HasField("dim_value")]


def _input(proto: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    return next(value for value in proto.graph.input if value.name == name)


def _dims(value: onnx.ValueInfoProto):
    return value.type.tensor_type.shape.dim

"""Ranges of the inputs' shapes where no KV cache says what they are for: encoders, pictures, plain networks.

A dynamic dimension gets, unless --shape says otherwise,

    the first axis            1 to --max-batch
    pictures [B,C,H,W,...]    sides, where all of them are dynamic, in steps of what the graph divides them by, up to 16 × that (or 8, if less)
    stacked caches            [2, B, H, P, D]: B as the first axis elsewhere, P 0 to --max-prompt; the masks beside them
                              have a column for each slot and each token
    every other axis          1 to --max-prompt (512): tokens, frames, points

Dimensions of one name are one size, so they get one range, in whichever inputs they stand, and so do those whose name says how
they follow from another: 8*height (suture.core.axes). Where TensorRT says that the graph takes no such shapes, a table of 77
positions among its weights for instance, all but the first axes are halved (`smaller`).
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import onnx

from suture.core import axes
from suture.core.errors import UserError
from suture.core.network.validity import uses_of_inputs
from suture.core.shapes import OPTION, ShapeRange

Range = tuple[int, int, int]  # smallest, the one to optimise for, largest
Place = tuple[str, int]  # input, axis
SEQUENCE, USUAL = 512, 128
SMALL_STEP = 8
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
STEPPING = ("Conv", "MaxPool", "AveragePool", "LpPool")


def default_ranges(proto: onnx.ModelProto, batch: int, sequence: int | None) -> dict[Place, Range]:
    """By place, for every dynamic dimension of the inputs. Raises UserError where nothing says what a dimension is for."""
    most = sequence or SEQUENCE
    tokens = (1, min(USUAL, most), most)
    found = _of_stacked_caches(proto, batch, tokens)
    rows = {_dims(value)[1].dim_param for value in proto.graph.input if (value.name, 1) in found and _is_stacked(value)}
    by_name: dict[str, Range] = {name: (1, 1, batch) for name in rows if name}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        picture = _is_picture(value)
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value") or (value.name, axis) in found:
                continue
            if picture and axis == 1 and dim.dim_param not in by_name:
                wrong = f"its dimension 1 ({dim.dim_param or 'unnamed'}), a picture's channels, is dynamic"
                raise UserError(f"input {value.name}", wrong, f"give {OPTION} {value.name}=min,opt,max")
            wanted = _following(dim.dim_param, by_name)
            if wanted is None:
                wanted = (1, 1, batch) if axis == 0 else picture_range(proto, value.name) if picture else tokens
            if dim.dim_param:
                by_name[dim.dim_param] = wanted
            found[value.name, axis] = wanted
    return found


def smaller(proto: onnx.ModelProto, shapes: Mapping[str, tuple]) -> dict[str, tuple[tuple[int, ...], ...]] | None:
    """A profile's `shapes` with half as much as usual, and no more, on each open axis that counts tokens; None where that
    leaves them as they are."""
    found = dict(shapes)
    for value in proto.graph.input:
        if value.name in shapes and not _is_picture(value):
            first = 1 if _is_stacked(value) else 0
            ranges = [_half(axis > first, *sizes) for axis, sizes in enumerate(zip(*shapes[value.name]))]
            found[value.name] = tuple(zip(*ranges))
    return None if found == dict(shapes) else found


def _half(counts: bool, least: int, usual: int, most: int) -> Range:
    half = max(usual // 2, least)
    return (least, half, half) if counts else (least, usual, most)


def _of_stacked_caches(proto: onnx.ModelProto, batch: int, tokens: Range) -> dict[Place, Range]:
    """Of old GPT-2's caches, keys and values in one, and of what has to fit them."""
    stacked = [value for value in proto.graph.input if _is_stacked(value)]
    if not stacked:
        return {}
    past = (0, tokens[1], tokens[2])
    found = {(value.name, axis): wanted for value in stacked for axis, wanted in ((1, (1, 1, batch)), (3, past))}
    uses = uses_of_inputs(proto)
    for value in proto.graph.input:
        use = uses.get(value.name)
        if use is not None and (use.mask or use.additive) and len(_dims(value)) == 2:
            found[value.name, 1] = (tokens[0], tokens[1] + past[1], tokens[2] + past[2])
    return {(name, axis): wanted for (name, axis), wanted in found.items() if not _fixed(proto, name, axis)}


def _fixed(proto: onnx.ModelProto, name: str, axis: int) -> bool:
    return next(_dims(value)[axis].HasField("dim_value") for value in proto.graph.input if value.name == name)


def _is_stacked(value: onnx.ValueInfoProto) -> bool:
    dims = _dims(value)
    return len(dims) == 5 and dims[0].dim_value == 2 and not dims[3].HasField("dim_value") and dims[4].HasField("dim_value")


def _is_picture(value: onnx.ValueInfoProto) -> bool:
    sides = _dims(value)[2:]
    floating = value.type.tensor_type.elem_type in FLOATS
    return floating and len(sides) >= 2 and not any(dim.HasField("dim_value") for dim in sides)


def _dims(value: onnx.ValueInfoProto):
    return value.type.tensor_type.shape.dim


def given_ranges(proto: onnx.ModelProto, shapes: Mapping[str, ShapeRange]) -> dict[Place, Range]:
    """By place, for the dynamic dimensions of the inputs in `shapes` and for those of the same names elsewhere. Raises
    UserError where two inputs give one name two ranges."""
    found: dict[Place, Range] = {}
    by_name: dict[str, tuple[str, Range]] = {}
    for value in proto.graph.input:
        if value.name not in shapes:
            continue
        given = shapes[value.name]
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            wanted = (given.minimum[axis], given.optimum[axis], given.maximum[axis])
            found[value.name, axis] = wanted
            follows = _following(dim.dim_param, {name: each for name, (_, each) in by_name.items()})
            other, before = by_name.setdefault(dim.dim_param or f"{value.name}[{axis}]", (value.name, follows or wanted))
            if before != wanted:
                what = f"its dimension {axis} ({dim.dim_param}) is {_said(wanted)}, and that of {other} is {_said(before)}"
                raise UserError(f"{OPTION} {value.name}", what, "give dimensions of one name one range")
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            follows = _following(dim.dim_param, {name: each for name, (_, each) in by_name.items()})
            if follows and not dim.HasField("dim_value"):
                found.setdefault((value.name, axis), follows)
    return found


def _following(name: str, known: Mapping[str, Range]) -> Range | None:
    """The range of a dimension of this name, where those of the `known` names say it."""
    ends = [axes.length(name, {other: each[end] for other, each in known.items()}) for end in range(3)] if name else [None]
    return None if None in ends else tuple(ends)


def picture_range(proto: onnx.ModelProto, name: str) -> Range:
    """Heights and widths of the picture `name` that each of the graph's steps can divide."""
    down, up = _steps(proto, name)
    step = math.ceil(down)
    usual = math.ceil(SMALL_STEP * max(down, up, SMALL_STEP) / step) * step
    return step, usual, 2 * usual


def _steps(proto: onnx.ModelProto, name: str) -> tuple[Fraction, Fraction]:
    """By how much the graph makes the picture smaller, and larger, at most."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants |= {node.output[0]: a.t for node in proto.graph.node if node.op_type == "Constant"
                  for a in node.attribute if a.name == "value"}  # fmt: skip
    sizes = {name: Fraction(1)}  # of a tensor's height, in the picture's
    for node in proto.graph.node:
        known = [sizes[each] for each in node.input[:1] if each in sizes] or [sizes[x] for x in node.input if x in sizes]
        if known:
            factor = _factor(node, constants)
            sizes |= dict.fromkeys(node.output, known[0] * factor)
    return 1 / min(sizes.values()), max(sizes.values())


def _factor(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Fraction:
    """What a node multiplies height and width by."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type in STEPPING:
        return Fraction(1, max(attributes.get("strides", [1])))
    if node.op_type == "ConvTranspose":
        return Fraction(max(attributes.get("strides", [1])))
    if node.op_type in ("SpaceToDepth", "DepthToSpace"):
        size = attributes["blocksize"]
        return Fraction(size) if node.op_type == "DepthToSpace" else Fraction(1, size)
    if node.op_type in ("Resize", "Upsample"):
        scales = next((constants[name] for name in node.input[1:] if name in constants
                       and constants[name].data_type == onnx.TensorProto.FLOAT and constants[name].dims[:1] != [0]), None)  # fmt: skip
        if scales is not None and scales.data_location != onnx.TensorProto.EXTERNAL:
            return Fraction(float(onnx.numpy_helper.to_array(scales)[-1])).limit_denominator(64) or Fraction(1)
    return Fraction(1)


def _said(wanted: Range) -> str:
    return " to ".join(map(str, (wanted[0], wanted[2])))

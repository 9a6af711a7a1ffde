"""Ranges of the inputs' shapes where no KV cache says what they are for: encoders, pictures, plain networks.

A dynamic dimension gets, unless --shape says otherwise,

    the first axis            1 to --max-batch
    pictures [B,C,H,W,...]    sides, where all of them are dynamic, in steps of what the graph divides them by, up to 16 × that (or 8, if less)
    every other axis          1 to --max-prompt (512): tokens, frames, points

Dimensions of one name are one size, so they get one range, in whichever inputs they stand, and so do those whose name says how
they follow from another: 8*height (suture.core.axes).
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import onnx

from suture.core import axes
from suture.core.errors import UserError
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
    found: dict[Place, Range] = {}
    by_name: dict[str, Range] = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        sides = tensor.shape.dim[2:]
        picture = tensor.elem_type in FLOATS and len(sides) >= 2 and not any(dim.HasField("dim_value") for dim in sides)
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value"):
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

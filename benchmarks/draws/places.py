"""What is computed of integers bit by bit, and what is sampled between pixels, one function an operator as in operators.py."""

import numpy as np
from onnx import TensorProto

from benchmarks.draws.canvas import Canvas
from benchmarks.draws.shapes import Drawing, some_shape

INT64, UINT32 = TensorProto.INT64, TensorProto.UINT32


def _integers(c: Canvas) -> str:
    """Of either sign."""
    return c.op("Sub", c.input(*some_shape(c), kind="int", below=1000), c.ints(c.pick(0, 500)))


def bitwise(op: str) -> Drawing:
    """Its lowest bits, or of operands that have only few, and now and then all of it."""

    def draw(c: Canvas):
        c.opset = max(c.opset, 18)
        x = _integers(c)
        if op == "BitwiseNot":
            return c.op(op, x), INT64
        other = c.ints(c.pick(6, 37, 255))
        few = c.near(True, False)
        if few and c.chance(0.4):  # operands that are known to be small
            return c.op(op, c.op("Mod", x, c.ints(c.pick(64, 100))), other), INT64
        found = c.op(op, x, other)
        if not few:
            return found, INT64
        return c.op("BitwiseAnd", found, c.ints(63)) if c.chance() else c.op("Mod", found, c.ints(128)), INT64

    return draw


def modulo(c: Canvas):
    return c.op("Mod", _integers(c), c.ints(c.pick(2, 7, 64)), fmod=c.pick(None, 0, 1)), INT64


def shift(c: Canvas):
    x = c.op("Cast", c.input(*some_shape(c), kind="int", below=1 << 20), to=UINT32)
    by = c.constant(np.array(c.pick(1, 5, 16), np.uint32))
    return c.op("Cast", c.op("BitShift", x, by, direction=c.pick("LEFT", "RIGHT")), to=INT64), INT64


def flatten(c: Canvas):
    return c.op("Flatten", c.input("B", "S", 4), axis=c.pick(None, 0, 2))


def grid_sample(c: Canvas):
    c.opset = max(c.opset, 16)
    given = {"mode": "linear" if c.opset >= 20 else "bilinear", "align_corners": c.pick(0, 1)}
    given["padding_mode"] = c.pick("zeros", "border")
    return c.op("GridSample", c.input(2, 3, 5, 4), c.input(2, 3, 2, 2), **given)


def affine_grid(c: Canvas):
    c.opset = max(c.opset, 20)
    volume = c.chance(0.3)
    size = c.ints(2, 3, 4, 5, 3) if volume else c.ints(2, 3, 4, 5)
    return c.op("AffineGrid", c.input(2, 3, 4) if volume else c.input(2, 2, 3), size, align_corners=c.pick(None, 1))


def deform_conv(c: Canvas):
    c.opset = max(c.opset, 19)
    groups, kernel = c.pick(1, 2), c.pick(1, 3)
    taps, pad = groups * kernel * kernel, kernel // 2
    inputs = [c.input(2, 4, 6, 5), c.weight(6, 4, kernel, kernel), c.input(2, 2 * taps, 6, 5)]
    if c.chance():
        inputs += [c.weight(6) if c.chance() else "", c.input(2, taps, 6, 5)]
    return c.op("DeformConv", *inputs, offset_group=groups, pads=[pad] * 4)


PLACES: dict[str, Drawing] = {
    **{op: bitwise(op) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot")},
    "Mod": modulo,
    "BitShift": shift,
    "Flatten": flatten,
    "GridSample": grid_sample,
    "AffineGrid": affine_grid,
    "DeformConv": deform_conv,
}

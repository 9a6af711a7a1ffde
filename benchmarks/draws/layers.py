"""What layers are made of, one function an operator as in operators.py: products, norms, activations, attention, quantisation."""

import numpy as np
from onnx import TensorProto, helper

from benchmarks.draws.canvas import Canvas
from benchmarks.draws.shapes import Drawing, some_shape

BOOL, INT64, FLOAT, FLOAT16 = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16


def conv(c: Canvas):
    kernel, channels = c.pick(1, 3), c.pick(2, 4)
    group = c.pick(1, 1, channels)
    x = c.input("B", channels, 6, 6)
    bias = [c.weight(4)] if c.chance() else []
    pads = [kernel // 2] * 4 if c.chance() else None
    drawn = pads is None
    w = c.weight(4, channels // group, kernel, kernel)
    return c.op("Conv", x, w, *bias, group=group, pads=pads, kernel_shape=[kernel] * 2 if c.chance() else None, drawn=drawn)


def conv_transpose(c: Canvas):
    """Patches side by side, or with what else the operator has: overlaps, pads, groups."""
    kernel, channels, group = c.pick(2, 3), 4, c.pick(1, 1, 2)
    strides = [kernel if c.chance(0.7) else 1] * 2
    bias = [c.weight(6)] if c.chance() else []
    pads = [1] * 4 if c.chance(0.3) else None
    w = c.weight(channels, 6 // group, kernel, kernel)
    x = c.input("B", channels, 4, 4)
    return c.op("ConvTranspose", x, w, *bias, strides=strides, group=group, pads=pads, drawn=pads is None)


def dequantise(c: Canvas):
    values = c.constant(c.rng.integers(-8, 8, (6, 4)).astype(np.int8))
    axis = c.pick(None, 0, 1, -1)
    scale = c.constant((c.rng.random(() if axis is None else (6, 4)[axis]) + 0.1).astype(np.float32))
    zero = [c.constant(np.zeros(() if axis is None else (6, 4)[axis], np.int8))] if c.chance() else []
    table = c.op("DequantizeLinear", values, scale, *zero, axis=axis)
    x = c.input("B", 6)
    return c.op("MatMul", x if c.dtype == FLOAT else c.op("Cast", x, to=FLOAT), table), FLOAT


def quantise(c: Canvas):
    """To integers and back, moved between or not; a weight or a bias in integers beside it, or integers as an output."""
    kind = c.pick(np.int8, np.int8, np.uint8, np.uint8, np.int16, np.uint16)
    c.opset = max(c.opset, 21 if kind in (np.int16, np.uint16) else 13)
    lowest, largest = np.iinfo(kind).min, np.iinfo(kind).max
    x = c.input("B", "S", 4)
    x = x if c.dtype == FLOAT else c.op("Cast", x, to=FLOAT)
    along = c.chance(0.3)
    given = {"axis": c.pick(2, -1)} if along else {}
    sizes = (4,) if along else ()
    scale = c.constant((c.rng.random(sizes) * 0.05 + 0.01).astype(np.float32))
    middle = (lowest + largest + 1) // 2
    zero = [c.constant(np.full(sizes, c.pick(middle, middle, 3), kind))] if kind != np.uint8 or c.chance(0.8) else []
    small = c.op("QuantizeLinear", x, scale, *zero, **given)
    if c.chance(0.3) and not along:
        small = c.op("Transpose", small, perm=[0, 2, 1])
    if c.chance(0.2) and kind in (np.int8, np.uint8):
        c.output(small, helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    result = c.op("DequantizeLinear", small, scale, *zero, **given)
    if c.chance(0.3):
        wide = c.pick(kind, np.int32)
        values = c.rng.integers(max(lowest, -300), min(largest, 300), (1,)).astype(wide)
        bias = c.op("DequantizeLinear", c.constant(values), c.constant(np.array(0.01, np.float32)))
        result = c.op("Add", result, bias)
    return result, FLOAT


def gelu(c: Canvas):
    c.opset = max(c.opset, 20)
    return c.op("Gelu", c.input(*some_shape(c)), drawn=True)


def gemm(c: Canvas):
    trans_a, trans_b = c.pick(0, 0, 1), c.pick(0, 1)
    a = c.input(*([3, "B"] if trans_a else ["B", 3]))
    b = c.any(*([4, 3] if trans_b else [3, 4]))
    third = [c.any(*c.pick((4,), (1, 4), (1,), ("B", 4)))] if c.chance() else []
    return c.op("Gemm", a, b, *third, transA=trans_a, transB=trans_b, drawn=True)


def norm(op: str, since: int) -> Drawing:
    def draw(c: Canvas):
        c.opset = max(c.opset, since)
        x = c.input("B", "S", 8)
        axis = c.near(-1, 2, 1)
        width = [3, 8] if axis == 1 else [8]
        x = c.input("B", *width) if axis == 1 else x
        inputs = [c.weight(*width, near=1.0), *([c.weight(*width)] if op == "LayerNormalization" and c.chance() else [])]
        attributes = {"axis": axis, "epsilon": c.pick(None, 1e-5, 0.1), "stash_type": c.pick(None, 1)}
        return c.op(op, x, *inputs, **attributes)

    return draw


def channel_norm(op: str, since: int) -> Drawing:
    """Over an image's rows and columns, of each channel, or of groups of them."""

    def draw(c: Canvas):
        c.opset = max(c.opset, since)
        groups = {"num_groups": c.pick(1, 2, 4)} if op == "GroupNormalization" else {}
        x = c.input("B", 4, *c.pick((3, 2), (6,), (2, 1, 3)))
        scale, bias = c.weight(4, near=1.0), c.weight(4)
        return c.op(op, x, scale, bias, epsilon=c.pick(None, 1e-5, 0.1), **groups)

    return draw


def matmul(c: Canvas):
    left = c.pick((3,), ("B", 3), ("B", "S", 3), ("B", 2, "S", 3))
    x = c.input(*left)
    if c.chance():
        return c.op("MatMul", x, c.weight(*c.pick((3, 4), (3,), (3, 4))))
    return c.op("MatMul", x, c.input(*(3, 4) if len(left) < 3 else (*left[:-2], 3, 4)))


def rotary(c: Canvas):
    c.opset = max(c.opset, 23)
    heads, dim = 2, 8
    x = c.input("B", heads, "S", dim) if c.chance(0.6) else c.input("B", "S", heads * dim)
    width = c.near(dim, 4)
    given = {"rotary_embedding_dim": 4} if width == 4 else {}
    given |= {"num_heads": heads} if len(c.inputs["in_0"].shape) == 3 else {}
    if c.chance():
        tables = [c.weight(6, width // 2), c.weight(6, width // 2)]
        inputs = [*tables, c.input("B", "S", kind="int", below=6)]
    else:
        inputs = [c.input("B", "S", width // 2), c.input("B", "S", width // 2)]
    return c.op("RotaryEmbedding", x, *inputs, interleaved=c.pick(None, 0, 1), **given)


def softmax(c: Canvas):
    return c.op("Softmax", c.input("B", "S", 4), axis=c.pick(None, -1, 2, 1, 0))


def swish(c: Canvas):
    c.opset = 24
    return c.op("Swish", c.input(*some_shape(c)), drawn=True)


def tensor_scatter(c: Canvas):
    c.opset = 24
    where_ = [c.input("B", kind="int", below=3)] if c.chance(0.8) else []
    return c.op(
        "TensorScatter",
        c.input("B", 2, 8, 4),
        c.input("B", 2, "S", 4),
        *where_,
        axis=c.near(-2, 2),
        mode=c.near("linear", "circular"),
    )


def attention(c: Canvas):
    """Of rank 3 or 4, with or without mask, cap, causality, a past, further outputs, values of another size."""
    c.opset = max(c.opset, 23)
    heads, kv_heads, size, value_size = c.pick(2, 4), 2, c.pick(4, 8), 0
    value_size = c.near(size, 4, 8)
    total = c.near("S", "P")
    sizes = [(heads, "S", size), (kv_heads, total, size), (kv_heads, total, value_size)]
    given = {}
    if c.chance(0.3):
        inputs = [c.input("B", steps, count * width) for count, steps, width in sizes]
        given = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    else:
        inputs = [c.input("B", *each) for each in sizes]
    past = c.chance(0.15)
    if past:
        inputs += ["" if c.chance(0.7) else c.input("S", 8)]
        inputs += [c.input("B", kv_heads, "P", size), c.input("B", kv_heads, "P", value_size)]
    elif c.chance(0.6):
        rows = c.pick(("S",), (1,), ("B", 1, "S"), ("B", heads, "S"), (heads, "S"), (1, 1, 1))
        inputs.append(c.input(*rows, total, kind=c.pick("mask", "float")))
    elif c.chance(0.2) and c.opset == 24:
        inputs += ["", "", "", c.input("B", kind="ones")]
    outputs = 3 if past and c.chance() else 1
    found = c.op("Attention", *inputs, outputs=outputs, drawn=True, **given)
    if outputs == 1:
        return found
    for cache in found[1:]:
        c.output(cache)
    return found[0]

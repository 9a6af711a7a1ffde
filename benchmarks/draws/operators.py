"""Single operators: for each that a pass names, one use of it with drawn inputs and attributes.

`OPERATORS` has a function an operator, which puts it on a canvas and returns its output, or (output, ONNX type).
"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.draws.canvas import Canvas

Drawing = Callable[[Canvas], object]
BOOL, INT64, FLOAT, FLOAT16 = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16


def _shape(c: Canvas, rank: int | None = None) -> list[int | str]:
    rank = rank or c.pick(1, 2, 3, 4)
    sizes = [c.pick("B", "S", 1, 2, 3, 4) for _ in range(rank)]
    return [*sizes[:-1], c.pick(2, 4, 8)]


def _pair(c: Canvas, kind: str = "float", rank: int | None = None) -> tuple[str, str]:
    """Two tensors that broadcast."""
    shape = _shape(c, rank)
    other = [1 if c.chance(0.2) else size for size in shape][c.pick(0, 0, 0, len(shape) - 1) :]
    names = [c.any(*shape, kind=kind), c.any(*other, kind=kind)]
    return tuple(names if c.chance(0.7) else names[::-1])


def unary(op: str, kind: str = "float", result: int | None = None) -> Drawing:
    def draw(c: Canvas):
        name = c.op(op, c.input(*_shape(c), kind=kind), drawn=True)
        return name if result is None else (name, result)

    return draw


def binary(op: str, kind: str = "float", result: int | None = None) -> Drawing:
    def draw(c: Canvas):
        first, second = _pair(c, kind)
        if c.chance(0.15):
            second = first
        name = c.op(op, first, second)
        return name if result is None else (name, result)

    return draw


def variadic(op: str) -> Drawing:
    return lambda c: c.op(op, *(_pair(c) if c.chance(0.8) else [c.input(*_shape(c))]))


def power(c: Canvas):
    return c.op("Pow", c.input(*_shape(c), kind="positive"), c.number(c.pick(2.0, 3.0, 0.5, -1.0), c.pick(0, 1)))


def where(c: Canvas):
    shape = _shape(c)
    return c.op("Where", c.any(*shape, kind="bool"), c.any(*shape), c.any(*shape) if c.chance() else c.number(c.pick(0, -1e4)))


def cast(c: Canvas):
    to = c.pick(FLOAT, FLOAT16, TensorProto.INT32, INT64, BOOL)
    return c.op("Cast", c.input(*_shape(c)), to=to, drawn=c.opset >= 19), to


def concat(c: Canvas):
    shape = _shape(c, c.pick(2, 3))
    axis = c.pick(*range(-len(shape), len(shape)))
    x = c.input(*shape)
    return c.op("Concat", *[x if c.chance(0.3) else c.any(*shape) for _ in range(c.pick(1, 2, 3))], axis=axis)


def constant(c: Canvas):
    given = c.pick({"value_float": 0.5}, {"value_floats": [0.5, 2.0]}, {"value_int": 3}, {"value_ints": [1, 2]})
    if c.opset < 13:
        given = {"value_float": 0.5} if c.opset > 11 else {}
    if not given:
        from onnx import numpy_helper

        given = {"value": numpy_helper.from_array(np.float32(0.5))}
    name = c.op("Constant", **given)
    if "value_int" in given or "value_ints" in given:
        name = c.op("Cast", name, to=FLOAT)
    return c.op("Add", c.op("Cast", c.input("B", 2), to=FLOAT), name), FLOAT


def constant_of_shape(c: Canvas):
    from onnx import numpy_helper

    value = c.pick(None, numpy_helper.from_array(np.array([0.5], np.float32)))
    return c.op("ConstantOfShape", c.op("Shape", c.input(*_shape(c, c.pick(1, 2)))), value=value), FLOAT


def conv(c: Canvas):
    kernel, channels = c.pick(1, 3), c.pick(2, 4)
    group = c.pick(1, 1, channels)
    x = c.input("B", channels, 6, 6)
    bias = [c.weight(4)] if c.chance() else []
    pads = [kernel // 2] * 4 if c.chance() else None
    drawn = pads is None
    w = c.weight(4, channels // group, kernel, kernel)
    return c.op("Conv", x, w, *bias, group=group, pads=pads, kernel_shape=[kernel] * 2 if c.chance() else None, drawn=drawn)


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
        c.output(small, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    result = c.op("DequantizeLinear", small, scale, *zero, **given)
    if c.chance(0.3):
        wide = c.pick(kind, np.int32)
        values = c.rng.integers(max(lowest, -300), min(largest, 300), (1,)).astype(wide)
        bias = c.op("DequantizeLinear", c.constant(values), c.constant(np.array(0.01, np.float32)))
        result = c.op("Add", result, bias)
    return result, FLOAT


def loop(c: Canvas):
    """x times a number, some rounds long; ended by a count, a condition or both."""
    c.opset = max(c.opset, 13)
    rounds, limit = c.pick(1, 3), c.pick("count", "condition", "both")
    count = {"count": rounds, "condition": c.pick(None, 2**63 - 1), "both": rounds + 2}[limit]
    last = c.constant(np.array(rounds - 1, np.int64))
    nodes = [
        helper.make_node("Cast", ["round"], ["as_float"], to=c.dtype),
        helper.make_node("Add", ["now", "as_float"], ["then"]),
    ]
    if limit == "count":
        nodes.append(helper.make_node("Identity", ["going"], ["goes"]))
    else:
        nodes.append(helper.make_node("Less", ["round", last], ["goes"]))
    value = helper.make_tensor_value_info
    inputs = [value("round", INT64, []), value("going", BOOL, []), value("now", c.dtype, None)]
    body = helper.make_graph(nodes, "body", inputs, [value("goes", BOOL, []), value("then", c.dtype, None)])
    most = "" if count is None else c.constant(np.array(count, np.int64))
    return c.op("Loop", most, c.constant(np.array(True)), c.input(*_shape(c, 2)), body=body)


def branch(c: Canvas):
    """One of two, by a constant, by a shape or by an input."""
    x, size = c.input("B", 4), c.pick("constant", "shape", "input")
    c.opset = max(c.opset, 13)
    condition = c.constant(np.array(c.chance()))
    if size == "shape":
        length = c.op("Slice", c.op("Shape", x), c.ints(1), c.ints(2))
        condition = c.op("Equal", length, c.ints(c.pick(4, 5)))
    elif size == "input":
        condition = c.op("Reshape", c.input(1, kind="bool"), c.ints(1))
    value = helper.make_tensor_value_info
    bodies = {}
    for name, op in (("then_branch", c.pick("Neg", "Tanh")), ("else_branch", "Sigmoid")):
        nodes = [helper.make_node(op, [x], ["inner"]), helper.make_node("Add", ["inner", x], ["inner_out"])]
        bodies[name] = helper.make_graph(nodes, name, [], [value("inner_out", c.dtype, None)])
    return c.op("If", condition, **bodies)


def clip(c: Canvas):
    c.opset = max(c.opset, 11)
    limits = [c.number(-0.5), c.number(0.7)]
    return c.op("Clip", c.input(*_shape(c)), *c.pick(limits, limits[:1], ["", limits[1]]))


def dropout(c: Canvas):
    x = c.input(*_shape(c))
    if c.opset < 12:
        return c.op("Dropout", x, ratio=0.3)
    inputs = [c.constant(np.array(0.3, np.float32)), *([c.constant(np.array(False))] if c.chance() else [])]
    return c.op("Dropout", x, *(inputs if c.chance() else []))


def expand(c: Canvas):
    shape = _shape(c, 3)
    x = c.any(*[1 if c.chance(0.4) else size for size in shape[:-1]], shape[-1])
    like = c.input(*shape)
    return c.op("Expand", x, c.op("Shape", like)) if c.chance(0.7) else c.op("Expand", x, c.ints(1, 1, shape[-1]))


def gather(c: Canvas):
    axis = c.pick(0, 1, -1)
    x = c.any(4, 4, 4)
    return c.op("Gather", x, c.input("B", kind="int", below=4) if c.chance() else c.ints(*c.pick((0,), (-1, 1))), axis=axis)


def tile(c: Canvas):
    return c.op("Tile", c.input("B", "S", 2), c.ints(*c.pick((1, 1, 1), (1, 2, 1), (2, 1, 3))))


def gelu(c: Canvas):
    c.opset = max(c.opset, 20)
    return c.op("Gelu", c.input(*_shape(c)), drawn=True)


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


def trilu(c: Canvas):
    c.opset = max(c.opset, 14)
    x = c.input(*c.pick(("S", "S"), ("B", 3, "S"), ("B", 2, 4, 4)))
    offset = [c.constant(np.array(c.pick(-5, -1, 0, 1, 5), np.int64))] if c.chance() else []
    return c.op("Trilu", x, *offset, drawn=True)


def matmul(c: Canvas):
    left = c.pick((3,), ("B", 3), ("B", "S", 3), ("B", 2, "S", 3))
    x = c.input(*left)
    if c.chance():
        return c.op("MatMul", x, c.weight(*c.pick((3, 4), (3,), (3, 4))))
    return c.op("MatMul", x, c.input(*(3, 4) if len(left) < 3 else (*left[:-2], 3, 4)))


def random_like(op: str) -> Drawing:
    """x + 0 * random: that it is not run beforehand, nor twice the same."""

    def draw(c: Canvas):
        x = c.input("B", 4)
        if op in ("RandomNormal", "RandomUniform"):
            noise = c.op(op, shape=[1, 4], dtype=c.dtype, drawn=True)
        elif op == "Multinomial":
            drawn = c.op(op, c.op("Cast", x, to=FLOAT), sample_size=4)
            noise = c.op("Cast", drawn, to=c.dtype)
        elif op == "Bernoulli":
            c.opset = max(c.opset, 18)
            noise = c.op(op, c.op("Sigmoid", x))
        else:
            noise = c.op(op, x, drawn=True)
        return c.op("Add", x, c.op("Mul", noise, c.number(0.0)))

    return draw


def ranged(c: Canvas):
    size = c.axes_op("Squeeze", c.op("Slice", c.op("Shape", c.input("B", "S")), c.ints(1), c.ints(2)), [0])
    numbers = [c.constant(np.array(value, np.int64)) for value in c.pick((0, 1), (2, 3), (1, 1))]
    return c.op("Range", numbers[0], size, numbers[1]), INT64


def reduced(op: str) -> Drawing:
    def draw(c: Canvas):
        x, axes = c.input("B", "S", 4), c.pick([-1], [2], [1], [0, 2], [1, 2], None)
        given = {"keepdims": c.pick(None, 0, 1)}
        if c.opset >= (18 if op == "ReduceMean" else 13) and c.chance(0.3):
            given["noop_with_empty_axes"] = c.pick(0, 1)
        return c.axes_op(op, x, axes, **given)

    return draw


def reshape(c: Canvas):
    x = c.input("B", "S", 8)
    target = c.pick((0, 0, 2, 4), (-1, 8), (0, -1, 4), (0, 0, -1), (-1, 2))
    if c.chance(0.4):
        sizes = c.op("Slice", c.op("Shape", x), c.ints(0), c.ints(2))
        return c.op("Reshape", x, c.op("Concat", sizes, c.ints(*c.pick((2, 4), (-1,), (8,), (4, -1))), axis=0))
    return c.op("Reshape", x, c.ints(*target), drawn=c.opset >= 14)


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


def scatter_elements(c: Canvas):
    given = {"reduction": c.pick("none", "add", "mul")} if c.opset >= 16 and c.chance() else {}
    axis = c.pick(None, 1, -1)
    rows = c.ints(0, 1) if axis is None else c.ints(0, 2)
    indices = c.op("Reshape", rows, c.ints(*((2, 1) if axis is None else (1, 2))))
    return c.op("ScatterElements", c.any(4, 4), indices, c.any(*((2, 1) if axis is None else (1, 2))), axis=axis, **given)


def scatter_nd(c: Canvas):
    given = {"reduction": c.pick("none", "add")} if c.opset >= 16 and c.chance() else {}
    indices = c.op("Reshape", c.ints(*c.pick((0, 2), (3, 1))), c.ints(2, 1))
    return c.op("ScatterND", c.input(4, "S"), indices, c.input(2, "S"), **given)


def shape(c: Canvas):
    given = {"start": c.pick(0, 1, -1), "end": c.pick(None, 2, 3)} if c.opset >= 15 and c.chance() else {}
    return c.op("Shape", c.input("B", "S", 4), **given), INT64


def slice_(c: Canvas):
    x = c.input("B", 6, 8)
    axis = c.pick(1, 2, -1)
    start, end, step = c.pick((0, 4, 1), (1, -1, 1), (0, 6, 2), (-3, 100, 1), (5, 0, -1))
    rest = [c.ints(axis), *([c.ints(step)] if step != 1 or c.chance() else [])]
    return c.op("Slice", x, c.ints(start), c.ints(end), *rest)


def softmax(c: Canvas):
    return c.op("Softmax", c.input("B", "S", 4), axis=c.pick(None, -1, 2, 1, 0))


def split(c: Canvas):
    return c.op("Mul", *c.split(c.input("B", "S", 8), c.pick([4, 4], [4, 4], [4, 4]), c.pick(2, -1)))


def squeeze(c: Canvas):
    return c.axes_op("Squeeze", c.input("B", 1, 4, 1), c.pick([1], [-1], [1, 3]))


def unsqueeze(c: Canvas):
    return c.axes_op("Unsqueeze", c.input("B", "S"), c.pick([0], [-1], [1, 2], [0, 3]))


def swish(c: Canvas):
    c.opset = 24
    return c.op("Swish", c.input(*_shape(c)), drawn=True)


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


def transpose(c: Canvas):
    return c.op("Transpose", c.input("B", "S", 4), perm=c.pick(None, [0, 2, 1], [2, 1, 0], [1, 0, 2]))


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


STANDARD: dict[str, Drawing] = {
    **{op: unary(op) for op in ("Cos", "Erf", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")},
    **{op: unary(op, "positive") for op in ("Sqrt", "Reciprocal")},
    "Not": unary("Not", "bool", BOOL),
    "IsNaN": unary("IsNaN", result=BOOL),
    **{op: binary(op) for op in ("Add", "Mul", "Sub")},
    "Div": binary("Div", "positive"),
    "And": binary("And", "bool", BOOL),
    **{op: binary(op, result=BOOL) for op in ("Equal", "Less", "LessOrEqual")},
    "Max": variadic("Max"),
    "Pow": power,
    "Where": where,
    "Cast": cast,
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Conv": conv,
    "DequantizeLinear": dequantise,
    "QuantizeLinear": quantise,
    "Clip": clip,
    "If": branch,
    "Loop": loop,
    "Round": unary("Round"),
    "Dropout": dropout,
    "Expand": expand,
    "Gather": gather,
    "Tile": tile,
    "Gelu": gelu,
    "Gemm": gemm,
    "LayerNormalization": norm("LayerNormalization", 17),
    "RMSNormalization": norm("RMSNormalization", 23),
    "GroupNormalization": channel_norm("GroupNormalization", 21),  # opset 18's, which onnx has taken back, is by group
    "InstanceNormalization": channel_norm("InstanceNormalization", 6),
    "Selu": lambda c: c.op("Selu", c.input(*_shape(c)), drawn=True),
    "Trilu": trilu,
    "MatMul": matmul,
    **{op: random_like(op) for op in ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
                                      "RandomUniformLike")},
    "Range": ranged,
    "ReduceMean": reduced("ReduceMean"),
    "ReduceSum": reduced("ReduceSum"),
    "Reshape": reshape,
    "RotaryEmbedding": rotary,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Shape": shape,
    "Slice": slice_,
    "Softmax": softmax,
    "Split": split,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Swish": swish,
    "TensorScatter": tensor_scatter,
    "Transpose": transpose,
    "Attention": attention,
}  # fmt: skip

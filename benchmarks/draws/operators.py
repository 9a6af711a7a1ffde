"""Single operators: for each that a pass names, one use of it with drawn inputs and attributes.

`STANDARD` has a function an operator, which puts it on a canvas and returns its output, or (output, ONNX type).
"""

import numpy as np
from onnx import TensorProto, helper

from benchmarks.draws.canvas import Canvas
from benchmarks.draws.layers import (
    attention,
    channel_norm,
    conv,
    conv_transpose,
    dequantise,
    gelu,
    gemm,
    matmul,
    norm,
    quantise,
    rotary,
    softmax,
    swish,
    tensor_scatter,
)
from benchmarks.draws.places import PLACES
from benchmarks.draws.shapes import Drawing, some_pair, some_shape

BOOL, INT64, FLOAT, FLOAT16 = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16


def unary(op: str, kind: str = "float", result: int | None = None) -> Drawing:
    def draw(c: Canvas):
        name = c.op(op, c.input(*some_shape(c), kind=kind), drawn=True)
        return name if result is None else (name, result)

    return draw


def binary(op: str, kind: str = "float", result: int | None = None) -> Drawing:
    def draw(c: Canvas):
        first, second = some_pair(c, kind)
        if c.chance(0.15):
            second = first
        name = c.op(op, first, second)
        return name if result is None else (name, result)

    return draw


def variadic(op: str) -> Drawing:
    return lambda c: c.op(op, *(some_pair(c) if c.chance(0.8) else [c.input(*some_shape(c))]))


def power(c: Canvas):
    return c.op("Pow", c.input(*some_shape(c), kind="positive"), c.number(c.pick(2.0, 3.0, 0.5, -1.0), c.pick(0, 1)))


def where(c: Canvas):
    shape = some_shape(c)
    return c.op("Where", c.any(*shape, kind="bool"), c.any(*shape), c.any(*shape) if c.chance() else c.number(c.pick(0, -1e4)))


def cast(c: Canvas):
    to = c.pick(FLOAT, FLOAT16, TensorProto.INT32, INT64, BOOL)
    return c.op("Cast", c.input(*some_shape(c)), to=to, drawn=c.opset >= 19), to


def concat(c: Canvas):
    shape = some_shape(c, c.pick(2, 3))
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
    return c.op("ConstantOfShape", c.op("Shape", c.input(*some_shape(c, c.pick(1, 2)))), value=value), FLOAT


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
    return c.op("Loop", most, c.constant(np.array(True)), c.input(*some_shape(c, 2)), body=body)


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
    return c.op("Clip", c.input(*some_shape(c)), *c.pick(limits, limits[:1], ["", limits[1]]))


def dropout(c: Canvas):
    x = c.input(*some_shape(c))
    if c.opset < 12:
        return c.op("Dropout", x, ratio=0.3)
    inputs = [c.constant(np.array(0.3, np.float32)), *([c.constant(np.array(False))] if c.chance() else [])]
    return c.op("Dropout", x, *(inputs if c.chance() else []))


def expand(c: Canvas):
    shape = some_shape(c, 3)
    x = c.any(*[1 if c.chance(0.4) else size for size in shape[:-1]], shape[-1])
    like = c.input(*shape)
    return c.op("Expand", x, c.op("Shape", like)) if c.chance(0.7) else c.op("Expand", x, c.ints(1, 1, shape[-1]))


def gather(c: Canvas):
    axis = c.pick(0, 1, -1)
    x = c.any(4, 4, 4)
    return c.op("Gather", x, c.input("B", kind="int", below=4) if c.chance() else c.ints(*c.pick((0,), (-1, 1))), axis=axis)


def tile(c: Canvas):
    return c.op("Tile", c.input("B", "S", 2), c.ints(*c.pick((1, 1, 1), (1, 2, 1), (2, 1, 3))))


def trilu(c: Canvas):
    c.opset = max(c.opset, 14)
    x = c.input(*c.pick(("S", "S"), ("B", 3, "S"), ("B", 2, 4, 4)))
    offset = [c.constant(np.array(c.pick(-5, -1, 0, 1, 5), np.int64))] if c.chance() else []
    return c.op("Trilu", x, *offset, drawn=True)


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
        if c.opset >= (13 if op == "ReduceSum" else 18) and c.chance(0.3):
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


def split(c: Canvas):
    return c.op("Mul", *c.split(c.input("B", "S", 8), c.pick([4, 4], [4, 4], [4, 4]), c.pick(2, -1)))


def squeeze(c: Canvas):
    return c.axes_op("Squeeze", c.input("B", 1, 4, 1), c.pick([1], [-1], [1, 3]))


def unsqueeze(c: Canvas):
    return c.axes_op("Unsqueeze", c.input("B", "S"), c.pick([0], [-1], [1, 2], [0, 3]))


def top_k(c: Canvas):
    """The largest or smallest elements; which they are is another output."""
    values, _ = c.op(
        "TopK", c.input("B", "S", 8), c.ints(c.pick(1, 1, 3)), outputs=2, axis=c.pick(None, -1, 2), largest=c.pick(None, 0, 1)
    )
    return values


def transpose(c: Canvas):
    return c.op("Transpose", c.input("B", "S", 4), perm=c.pick(None, [0, 2, 1], [2, 1, 0], [1, 0, 2]))


STANDARD: dict[str, Drawing] = {
    **{op: unary(op) for op in ("Abs", "Cos", "Erf", "Floor", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")},
    **{op: unary(op, "positive") for op in ("Sqrt", "Reciprocal")},
    "Not": unary("Not", "bool", BOOL),
    "IsNaN": unary("IsNaN", result=BOOL),
    **{op: binary(op) for op in ("Add", "Mul", "Sub")},
    "Div": binary("Div", "positive"),
    "And": binary("And", "bool", BOOL),
    **{op: binary(op, result=BOOL) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    **{op: variadic(op) for op in ("Max", "Min")},
    "Pow": power,
    "Where": where,
    "Cast": cast,
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
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
    "Selu": lambda c: c.op("Selu", c.input(*some_shape(c)), drawn=True),
    "Trilu": trilu,
    "MatMul": matmul,
    **{op: random_like(op) for op in ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
                                      "RandomUniformLike")},
    "Range": ranged,
    **{op: reduced(op) for op in ("ReduceMax", "ReduceMean", "ReduceProd", "ReduceSum")},
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
    "TopK": top_k,
    "Transpose": transpose,
    "Attention": attention,
    **PLACES,
}  # fmt: skip

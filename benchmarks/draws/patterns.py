"""Forms that passes rewrite, written out with the choices that exporters have, and now and then with one thing wrong."""

from math import sqrt

import numpy as np
from onnx import TensorProto

from benchmarks.draws.canvas import Canvas

LOWEST = -1e4


def layer_norm(c: Canvas, rms: bool = False):
    x, axis = c.input("B", "S", 8), [c.near(-1, 1)]
    keep = {"keepdims": c.near(None, 1)}
    centred = x if rms else c.op("Sub", *[x, c.axes_op("ReduceMean", x, axis, **keep)][:: c.near(1, -1)])
    if not rms and c.chance(0.1):
        centred = c.op("Sub", x, c.axes_op("ReduceMean", c.input("B", "S", 8), axis, **keep))
    if c.chance(0.6):
        squared = c.op("Pow", centred, c.number(c.near(2.0, 4.0)))
    else:
        squared = c.op("Mul", centred, c.near(centred, x))
    variance = c.axes_op("ReduceMean", squared, axis, **keep)
    shifted = c.op("Add", *[variance, c.number(c.pick(1e-5, 0.1))][:: c.pick(1, -1)])
    root = c.op("Sqrt", shifted)
    if rms and c.chance():
        normed = c.op("Mul", centred, c.op("Reciprocal", root))
    else:
        normed = c.op(c.near("Div", "Mul"), centred, root)
    if c.chance(0.8):
        weight = c.weight(*c.near((8,), (1, 8), (1,), (1, 1, 8)), near=1.0)
        normed = c.op("Mul", *[normed, weight][:: c.pick(1, -1)])
        if not rms and c.chance(0.8):
            normed = c.op("Add", *[normed, c.weight(*c.near((8,), (1,), (1, 1, 8)))][:: c.pick(1, -1)])
    return normed


def rms_norm(c: Canvas):
    return layer_norm(c, rms=True)


def gelu(c: Canvas):
    x = c.input("B", "S", 8)
    half = c.near(0.5, 0.4)
    if c.chance():
        inside = c.op("Div", x, c.number(c.near(sqrt(2.0), 1.5)))
        function = c.op("Erf", inside)
    else:
        cubic = c.op("Mul", c.op("Pow", x, c.number(c.near(3.0, 2.0))), c.number(c.near(0.044715, 0.05)))
        function = c.op("Tanh", c.op("Mul", c.op("Add", x, cubic), c.number(c.near(sqrt(2 / np.pi), 0.7))))
    one = c.op("Add", function, c.number(c.near(1.0, 2.0)))
    other = c.near(x, c.op("Relu", x)) if c.chance(0.3) else x
    if c.chance():
        return c.op("Mul", c.op("Mul", other, one), c.number(half))
    return c.op("Mul", c.op("Mul", other, c.number(half)), one)


def swish(c: Canvas):
    x = c.input("B", "S", 8)
    inside = c.op("Mul", x, c.number(1.702)) if c.chance() else x
    gate = c.op("Sigmoid", inside)
    return c.op("Mul", *[c.near(x, inside), gate][:: c.pick(1, -1)])


def linear(c: Canvas):
    x = c.input(*c.pick(("B", 8), ("B", "S", 8), ("B", 2, "S", 8)))
    if c.chance(0.4):
        weight = c.op("Transpose", c.weight(4, 8), perm=c.pick(None, [1, 0]))
    else:
        weight = c.weight(8, 4)
    y = c.op("MatMul", x, weight)
    if c.chance(0.7):
        y = c.op("Add", *[y, c.weight(*c.near((4,), (1, 4), (1,)))][:: c.pick(1, -1)])
    return y


def gated(c: Canvas):
    x = c.input(*c.pick(("B", 8), ("B", "S", 8)))
    if c.chance():
        both = c.op("MatMul", x, c.weight(8, 16))
        sizes = c.near([8, 8], [10, 6]) if c.chance(0.3) else [8, 8]
        gate, up = c.split(both, sizes, -1)
        if sizes[0] != sizes[1]:
            return c.op("Concat", c.op("Sigmoid", gate), up, axis=-1)
    else:
        gate, up = (c.op("MatMul", x, c.weight(8, 8)) for _ in range(2))
    act = c.op("Mul", gate, c.op("Sigmoid", gate)) if c.chance() else c.op(c.pick("Relu", "Sigmoid"), gate)
    return c.op("Mul", *[act, up][:: c.pick(1, -1)])


def convolutions(c: Canvas):
    x = c.input("B", 4, 6, 6)
    sizes = c.pick((1, 3), (3, 1), (1, 1))
    parts = [c.op("Conv", x, c.weight(4, 4, size, size, scale=0.3), c.weight(4), pads=[size // 2] * 4) for size in sizes]
    return c.op("Add", *parts)


def repeated(c: Canvas):
    """The same subexpression twice, a constant twice, a random one twice."""
    x, values = c.input("B", "S", 4), c.rng.standard_normal(4)
    parts = []
    for _ in range(2):
        y = c.op("Mul", x, c.constant(values.astype(c.numpy)))
        y = c.op(c.pick("Tanh", "Tanh", "Relu"), y)
        parts.append(c.axes_op("ReduceMean", y, [-1], keepdims=c.near(1, 1)))
    return c.op("Sub", *parts)


def shapes(c: Canvas):
    """Reshape by computed sizes, in the forms that exporters have."""
    x = c.input("B", "S", 8)
    whole = c.op("Shape", x)

    def size(axis: int) -> str:
        if c.chance():
            return c.axes_op("Unsqueeze", c.op("Gather", whole, c.constant(np.array(axis, np.int64))), [0])
        return c.op("Slice", whole, c.ints(axis), c.ints(axis + 1))

    rows, steps = size(0), size(c.near(1, 0))
    if c.chance(0.3):
        product = c.op("Mul", rows, steps)
        return c.op("Reshape", x, c.op("Concat", c.near(product, rows), c.ints(-1), axis=0))
    target = c.op("Concat", rows, steps, c.ints(*c.pick((2, 4), (-1,), (4, -1))), axis=0)
    if c.chance(0.3):
        ones = c.op("ConstantOfShape", c.ints(c.near(4, 4)))
        target = c.op("Concat", rows, c.ints(-1), c.ints(4), axis=0) if ones is None else target
    y = c.op("Reshape", x, target)
    if c.chance(0.3):
        zero = c.op("Mul", c.op("Cast", c.op("Slice", whole, c.ints(1), c.ints(2)), to=c.dtype), c.number(0.5))
        return c.op("Add", y, zero)
    return y


def rotary(c: Canvas):
    heads, size = 2, 8
    x = c.input("B", heads, "S", size)
    angles = c.input("B", "S", size // 2)
    if c.chance(0.8):
        doubled = c.op("Concat", angles, c.near(angles, c.op("Neg", angles)) if c.chance(0.2) else angles, axis=-1)
    else:
        doubled = c.input("B", "S", size)
    cos, sin = (c.axes_op("Unsqueeze", c.op(op, doubled), [c.near(1, 1)]) for op in ("Cos", "Sin"))
    middle = c.near(size // 2, size // 4)
    if c.chance():
        first = c.op("Slice", x, c.ints(0), c.ints(middle), c.ints(-1))
        second = c.op("Slice", x, c.ints(middle), c.ints(c.pick(size, 1 << 60)), c.ints(-1))
    else:
        first, second = c.split(x, [middle, size - middle], -1)
    turned = c.op("Concat", *[c.op("Neg", second), first][:: c.near(1, -1)], axis=-1)
    parts = c.op("Mul", x, cos), c.op("Mul", turned, c.near(sin, cos))
    return c.op("Add", *parts[:: c.pick(1, -1)])


def attention(c: Canvas):
    """softmax(scale * q @ k^T + mask) @ v, of four dimensions or three, with heads shared, capped, guarded."""
    heads, size, total = c.pick(2, 4), c.pick(4, 8), c.near("S", "P")
    kv_heads = c.near(heads, 2)
    packed = c.chance(0.3)

    def side(count: int, steps: str) -> str:
        if not packed:
            return c.input("B", count, steps, size)
        rows = c.op("Reshape", c.input("B", steps, count * size), c.ints(0, 0, count, size))
        return c.op("Transpose", rows, perm=[0, 2, 1, 3])

    q, k, v = side(heads, "S"), side(kv_heads, total), side(kv_heads, total)
    if kv_heads != heads:
        k, v = (_shared(c, x, kv_heads, heads // kv_heads, size) for x in (k, v))
    scale, place = c.near(size**-0.5, 0.3), c.pick("scores", "query", "both", "div")
    if place == "query":
        q = c.op("Mul", q, c.number(scale))
    elif place == "both":
        q, k = (c.op("Mul", x, c.number(sqrt(scale))) for x in (q, k))
    k = c.op("Transpose", k, perm=c.near([0, 1, 3, 2], [0, 1, 3, 2]))
    scores = c.op("MatMul", q, k)
    if place == "scores":
        scores = c.op("Mul", scores, c.number(scale))
    elif place == "div":
        scores = c.op("Div", scores, c.number(1 / scale))
    if c.chance(0.1):
        scores = c.op("Mul", c.op("Tanh", c.op("Div", scores, c.number(2.0))), c.number(2.0))
    for _ in range(c.pick(0, 1, 1, 1, 2)):
        scores = _masked(c, scores, heads, total)
    weights = c.op("Softmax", scores, axis=c.near(-1, 3, 2))
    if c.chance(0.2):
        weights = c.op("Where", c.op("IsNaN", weights), c.number(0.0), weights)
    y = c.op("MatMul", *[weights, v])
    if c.chance():
        y = c.op("Reshape", c.op("Transpose", y, perm=[0, 2, 1, 3]), c.ints(0, 0, -1))
    return y


def _masked(c: Canvas, scores: str, heads: int, total: str) -> str:
    shape = c.pick(
        ("B", 1, "S", total), ("B", 1, 1, total), ("S", total), (1, 1, "S", total), ("B", heads, "S", total), (1, total)
    )
    if c.chance(0.4):
        return c.op("Add", *[scores, c.input(*shape)][:: c.pick(1, -1)])
    seen, lowest = c.input(*shape, kind="mask"), c.number(c.near(LOWEST, -1.0, 0.0))
    if c.chance():
        return c.op("Where", seen, scores, lowest)
    if c.chance():
        return c.op("Where", c.op("Not", seen), lowest, scores)
    bias = c.op("Mul", c.op("Sub", c.number(1.0), c.op("Cast", seen, to=c.dtype)), lowest)
    return c.op("Add", scores, bias)


def _shared(c: Canvas, x: str, heads: int, group: int, size: int) -> str:
    """Each head `group` times, one after the other, or wrongly all heads after all heads."""
    axis = c.near(2, 1)
    wide = c.axes_op("Unsqueeze", x, [axis])
    wide = c.op("Expand", wide, c.ints(*(1, heads, group, 1, 1) if axis == 2 else (1, group, heads, 1, 1)))
    return c.op("Reshape", wide, c.ints(0, heads * group, -1, size))


def encoder(c: Canvas):
    """Ids, a table, a norm, one packed projection, attention, a residual sum."""
    ids = c.input("B", "S", kind="int", below=16, name=c.near("input_ids", "x"))
    x = c.op("Gather", c.weight(16, 16), ids)
    c.opset = max(c.opset, 17)
    normed = c.op("LayerNormalization", x, c.weight(16, near=1.0), c.weight(16))
    packed = c.op("Add", c.op("MatMul", normed, c.weight(16, 48, scale=0.3)), c.weight(48))
    q, k, v = c.split(packed, [16, 16, 16], c.near(-1, 2))
    heads = c.pick(2, 4)
    q, k, v = (c.op("Transpose", c.op("Reshape", each, c.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3]) for each in (q, k, v))
    scores = c.op("Mul", c.op("MatMul", q, c.op("Transpose", k, perm=[0, 1, 3, 2])), c.number(0.35))
    y = c.op("MatMul", c.op("Softmax", scores, axis=-1), v)
    y = c.op("Reshape", c.op("Transpose", y, perm=[0, 2, 1, 3]), c.ints(0, 0, 16))
    y = c.op("Add", x, c.op("MatMul", y, c.weight(16, 16, scale=0.3)))
    return c.op("Mul", y, c.op("Sigmoid", y)) if c.chance() else y


def decoder(c: Canvas):
    """One layer over a cache that grows: attention written out, or one that keeps its cache itself."""
    c.decoder, c.axes, c.opset = True, "letters", 24
    heads, kv_heads, size, hidden, vocabulary = 4, c.pick(2, 4), 8, 32, 16
    ids = c.input("batch", "sequence", kind="tokens", name="input_ids", below=vocabulary)
    mask = c.input("batch", "total", kind="ones", name="attention_mask")
    x = c.op("Gather", c.weight(vocabulary, hidden), ids)

    def side(count: int) -> str:
        rows = c.op("MatMul", x, c.weight(hidden, count * size, scale=0.3))
        return c.op("Transpose", c.op("Reshape", rows, c.ints(0, 0, count, size)), perm=[0, 2, 1, 3])

    q, k, v = side(heads), side(kv_heads), side(kv_heads)
    pasts = [c.input("batch", kv_heads, "past", size, name=f"past_key_values.0.{role}") for role in ("key", "value")]
    presents = [f"present.0.{role}" for role in ("key", "value")]
    zero, one = c.constant(np.array(0, np.int64)), c.constant(np.array(1, np.int64))
    total = c.op("Squeeze", c.op("Shape", mask, start=1, end=2))
    steps = c.op("Squeeze", c.op("Shape", ids, start=1, end=2))
    slots = c.op("Range", zero, total, one)
    own = c.op("Add", c.op("Range", zero, steps, one), c.op("Sub", total, steps))
    own = c.op("Unsqueeze", own, c.ints(1))
    seen = c.op("LessOrEqual", slots, c.near(own, c.op("Add", own, one)))
    if c.chance(0.2):  # which padding inside a row, that a static cache has none of, does not reach in the steps that are fed
        window = c.op("Greater", slots, c.op("Sub", own, c.constant(np.array(12, np.int64))))
        seen = c.op("And", seen, window)
    seen = c.op("And", seen, c.op("Unsqueeze", c.op("Cast", mask, to=TensorProto.BOOL), c.ints(1, 2)))
    given = {"scale": c.near(None, 0.3), "softcap": c.near(None, 2.0)}
    if c.chance(0.3):
        names = ["context", *presents]
        y, *_ = c.op("Attention", q, k, v, seen, *pasts, outputs=names, **given)
    else:
        keys, values = (c.op("Concat", *pair, outputs=[name], axis=2) for *pair, name in zip(pasts, (k, v), presents))
        y = c.op("Attention", q, keys, values, seen, **given)
    y = c.op("Reshape", c.op("Transpose", y, perm=[0, 2, 1, 3]), c.ints(0, 0, hidden))
    y = c.op("Add", x, c.op("MatMul", y, c.weight(hidden, hidden, scale=0.3)))
    c.op("MatMul", y, c.weight(hidden, vocabulary, scale=0.3), outputs=["logits"])
    c.outputs |= dict.fromkeys(["logits", *presents], c.dtype)


PATTERNS = (layer_norm, rms_norm, gelu, swish, linear, gated, convolutions, repeated, shapes, rotary, attention, attention,
            encoder, decoder)  # fmt: skip

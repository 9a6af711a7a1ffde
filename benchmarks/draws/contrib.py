"""onnxruntime's contrib operators, each used once, with drawn inputs and attributes; a decoder where they keep a cache."""

import numpy as np
from onnx import TensorProto

from benchmarks.draws.canvas import Canvas
from benchmarks.draws.shapes import Drawing, some_shape

FLOAT = TensorProto.FLOAT
HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 2, 8, 16


def activation(op: str) -> Drawing:
    def draw(c: Canvas):
        x = c.input(*some_shape(c, 3)[:2], 4)
        if op == "QuickGelu":
            return c.contrib(op, x, alpha=c.pick(None, 1.702, 1.0))
        bias = op == "BiasGelu" or (op == "FastGelu" and c.chance())
        return c.contrib(op, x, *([c.weight(4)] if bias else []))

    return draw


def embed_layer_norm(c: Canvas):
    tables = [c.weight(VOCABULARY, 8), c.weight(8, 8)]
    segments, mask, places = c.chance(), c.chance(), c.chance(0.3)
    ids = c.input("B", "S", kind="int32", below=VOCABULARY)
    inputs = [ids, c.input("B", "S", kind="int32") if segments else "", *tables, c.weight(2, 8) if segments else "",
              c.weight(8, near=1.0), c.weight(8)]  # fmt: skip
    if mask or places:
        inputs.append(c.input("B", "S", kind="int32") if mask else "")
    if places:
        inputs.append(c.input("B", "S", kind="int32", below=8))
    total = c.chance(0.3)
    found = c.contrib("EmbedLayerNormalization", *inputs, outputs=3 if total else 2 if mask or c.chance() else 1,
                      epsilon=c.pick(None, 1e-5), mask_index_type=c.pick(None, 1) if mask else None)  # fmt: skip
    if total:
        c.output(found[2])
    if mask and not isinstance(found, str) and c.chance():
        c.output(found[1], TensorProto.INT32)
    return found if isinstance(found, str) else found[0]


def fused_matmul(c: Canvas):
    a, b = c.pick(0, 1), c.pick(0, 1)
    given = {"alpha": c.pick(None, 0.5), "transA": a or None, "transB": b or None}
    given |= {"transBatchA": 1} if c.chance(0.1) else {}
    x = c.input(*(("B", 3, "S") if a else ("B", "S", 3)))
    return c.contrib("FusedMatMul", x, c.any(*((4, 3) if b else (3, 4))), **given)


def gather_quantised(c: Canvas):
    rows, block = 6, 16
    packed = c.constant(c.rng.integers(0, 256, (rows, 16)).astype(np.uint8))
    scales = c.constant((c.rng.random((rows, 2)) + 0.1).astype(c.numpy))
    zero = [c.constant(c.rng.integers(0, 256, (rows, 1)).astype(np.uint8))] if c.chance() else []
    ids = c.input("B", "S", kind="int", below=rows)
    return c.contrib(
        "GatherBlockQuantized", packed, ids, scales, *zero, bits=4, block_size=block, gather_axis=0, quantize_axis=1
    )


def nbits_matmul(c: Canvas):
    k, n, block = 32, 8, c.pick(16, 32)
    blocks = k // block
    packed = c.constant(c.rng.integers(0, 256, (n, blocks, block // 2)).astype(np.uint8))
    scales = c.constant((c.rng.random((n * blocks,)) * 0.1 + 0.01).astype(c.numpy))
    extra = []
    if c.chance():
        zero = c.rng.integers(0, 256, (n, (blocks + 1) // 2)).astype(np.uint8)
        extra = [c.constant(zero if c.chance() else np.full_like(zero, 0x88))]
    if c.chance(0.3):
        extra = [*(extra or [""]), "", c.weight(n)]
    return c.contrib(
        "MatMulNBits", c.input("B", "S", k), packed, scales, *extra, K=k, N=n, bits=4, block_size=block, accuracy_level=1
    )


def skip_norm(op: str) -> Drawing:
    def draw(c: Canvas):
        shape = ("B", "S", 8)
        inputs = [c.input(*shape), c.input(*shape), c.weight(8, near=1.0)]
        rest = [c.weight(8) if c.chance() else ""] * (op == "SkipLayerNormalization") + [c.weight(8) if c.chance() else ""]
        while rest and not rest[-1]:
            rest.pop()
        total = c.chance()
        names = ["y", "", "", "sum"] if total else ["y"]
        c.contrib(op, *inputs, *rest, outputs=names, epsilon=c.pick(None, 1e-5, 0.1))
        if total:
            c.output("sum")
        return "y"

    return draw


def simplified_norm(c: Canvas):
    given = {"axis": c.pick(None, -1), "epsilon": c.pick(None, 1e-5, 0.1), "stash_type": c.pick(None, 1)}
    return c.op("SimplifiedLayerNormalization", c.input("B", "S", 8), c.weight(8, near=1.0), **given)


def rotary(c: Canvas):
    four = c.chance()
    x = c.input("B", HEADS, "S", SIZE) if four else c.input("B", "S", HEADS * SIZE)
    positions = c.input("B", "S", kind="int", below=4) if c.chance(0.6) else c.input(1, kind="int", below=2)
    tables = [c.weight(16, SIZE // 2), c.weight(16, SIZE // 2)]
    return c.contrib("RotaryEmbedding", x, positions, *tables, interleaved=c.pick(None, 0, 1), scale=c.near(None, 2.0))


def packed_attention(c: Canvas):
    x, width = c.input("B", "S", 16), 16
    sizes = c.near(None, [16, 16, 32])
    inputs = [x, c.weight(16, sum(sizes) if sizes else 3 * width, scale=0.3)]
    bias, past = c.chance(0.8), c.chance(0.2)
    inputs.append(c.weight(sum(sizes) if sizes else 3 * width) if bias else "")
    mask = c.pick("", "rows", "rows", "slots", "lengths", "ends")
    total = "S"
    if past:
        mask, sizes = "", None
        inputs[1] = c.weight(16, 3 * width, scale=0.3)
        inputs[2] = c.weight(3 * width) if bias else ""
    kinds = {"rows": ("B", total), "slots": ("B", "S", total), "lengths": ("B",)}
    if mask == "lengths":
        inputs.append(c.axes_op("ReduceSum", c.input("B", "S", kind="prefix"), [1], keepdims=0))
    elif mask == "ends":
        first = c.axes_op("ReduceSum", c.input("B", "S", kind="prefix"), [1], keepdims=0)
        one = c.op("Sub", first, first)
        last = c.op("Concat", first, one, axis=0) if c.chance() else c.op("Identity", first)
        inputs.append(c.op("Identity", last))
    elif mask:
        inputs.append(c.op("Cast", c.input(*kinds[mask], kind="mask"), to=TensorProto.INT32))
    elif past:
        inputs += ["", c.input(2, "B", HEADS, "P", 4)]
    if not past and c.chance(0.3):
        inputs += [""] * (5 - len(inputs)) + [c.input(*c.pick(("B", HEADS, "S", "S"), (1, HEADS, "S", "S")))]
    given = {"unidirectional": c.pick(None, 0, 1), "scale": c.near(None, 0.4), "qkv_hidden_sizes": sizes,
             "mask_filter_value": c.near(None, -3.0)}  # fmt: skip
    found = c.contrib("Attention", *inputs, outputs=2 if past else 1, num_heads=HEADS, **given)
    if past:
        c.output(found[1])
        return found[0]
    return found


def multi_head_attention(c: Canvas):
    width, total = HEADS * SIZE, c.near("S", "P")
    inputs, form = [c.input("B", "S", width)], c.pick("self", "apart", "apart", "kv", "qkv", "cached")
    bias = form in ("apart",) and c.chance()
    if form == "self":
        inputs, total = [*inputs, *(c.op("Mul", inputs[0], c.weight(width)) for _ in "kv")], "S"
    elif form == "qkv":
        inputs, total = [c.input("B", "S", HEADS, 3, SIZE)], "S"
    elif form == "kv":
        inputs.append(c.input("B", total, HEADS, 2, SIZE))
    elif form == "cached":
        inputs += [c.input("B", HEADS, total, SIZE), c.input("B", HEADS, total, SIZE)]
    else:
        inputs += [c.input("B", total, width), c.input("B", total, width)]
    rest = [*["", ""][: 3 - len(inputs)], c.weight(3 * width) if bias else ""]
    padding, added = c.chance(0.3), c.chance(0.3)
    mask = c.op("Cast", c.input("B", total, kind="mask"), to=TensorProto.INT32) if padding else ""
    rest += [mask, c.input(c.pick("B", 1), HEADS, "S", total) if added else ""]
    while rest and not rest[-1]:
        rest.pop()
    given = {"unidirectional": c.pick(None, 0, 1), "scale": c.near(None, 0.4), "mask_filter_value": c.near(None, -3.0)}
    return c.contrib("MultiHeadAttention", *inputs, *rest, num_heads=HEADS, **given)


def grouped_query_attention(c: Canvas):
    """A decoder of one layer: tokens, a mask, a cache that grows."""
    c.decoder, c.axes = True, "letters"
    hidden, kv_width = HEADS * SIZE, KV_HEADS * SIZE
    ids = c.input("batch", "sequence", kind="tokens", name="input_ids", below=VOCABULARY)
    mask = c.input("batch", "total", kind="ones", name="attention_mask")
    x = c.op("Gather", c.weight(VOCABULARY, hidden), ids)
    counts = c.op("Sub", c.axes_op("ReduceSum", mask, [1], keepdims=0), c.ints(1))
    lengths = c.op("Cast", counts, to=TensorProto.INT32)
    total = c.op("Cast", c.op("Gather", c.op("Shape", mask), c.constant(np.array(1, np.int64))), to=TensorProto.INT32)
    if c.chance():
        parts = [c.op("MatMul", x, c.weight(hidden, hidden + 2 * kv_width, scale=0.2)), "", ""]
    else:
        parts = [c.op("MatMul", x, c.weight(hidden, width, scale=0.2)) for width in (hidden, kv_width, kv_width)]
    pasts = [c.input("batch", KV_HEADS, "past", SIZE, name=f"past_key_values.0.{role}") for role in ("key", "value")]
    presents = [f"present.0.{role}" for role in ("key", "value")]
    rotary_ = c.chance()
    tables = [c.weight(32, SIZE // 2), c.weight(32, SIZE // 2)] if rotary_ else []
    given = {"do_rotary": 1 if rotary_ else None, "rotary_interleaved": c.pick(None, 1) if rotary_ else None,
             "scale": c.near(None, 0.4), "softcap": c.near(None, 2.0), "local_window_size": c.near(None, 3),
             "smooth_softmax": c.near(None, 1)}  # fmt: skip
    names = [*parts, *pasts, lengths, total, *tables]
    y, *_ = c.contrib(
        "GroupQueryAttention", *names, outputs=["context", *presents], num_heads=HEADS, kv_num_heads=KV_HEADS, **given
    )
    c.op("MatMul", y, c.weight(hidden, VOCABULARY, scale=0.2), outputs=["logits"])
    c.outputs |= dict.fromkeys(["logits", *presents], c.dtype)


CONTRIB: dict[str, Drawing] = {
    "Gelu": activation("Gelu"),
    "BiasGelu": activation("BiasGelu"),
    "FastGelu": activation("FastGelu"),
    "QuickGelu": activation("QuickGelu"),
    "EmbedLayerNormalization": embed_layer_norm,
    "FusedMatMul": fused_matmul,
    "GatherBlockQuantized": gather_quantised,
    "MatMulNBits": nbits_matmul,
    "SkipLayerNormalization": skip_norm("SkipLayerNormalization"),
    "SkipSimplifiedLayerNormalization": skip_norm("SkipSimplifiedLayerNormalization"),
    "SimplifiedLayerNormalization": simplified_norm,
    "RotaryEmbedding": rotary,
    "Attention": packed_attention,
    "MultiHeadAttention": multi_head_attention,
    "GroupQueryAttention": grouped_query_attention,
}

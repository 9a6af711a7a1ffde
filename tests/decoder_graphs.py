"""A small decoder as a growing and as a static graph over the same weights, and ways to get it wrong."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.runtime.graphs import OnnxDecoder, graph_of

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CAPACITY, POSITIONS = 2, 32, 4, 2, 8, 64, 96, 128
DTYPES = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    ml_dtypes.bfloat16: TensorProto.BFLOAT16,
}


def decoder_graph(static: bool, dtype: type = np.float32, last: bool = False, **fault) -> onnx.ModelProto:
    """Faults: scale (a factor on the scores), mask (slots that attention looks too far), swap (keys for values in layer
    1's cache), late (slots that the cache is written too late), disturb (of one weight), nan (in one weight)."""
    onnx_dtype = DTYPES[dtype]
    nodes, weights = [], {}
    random = np.random.default_rng(0)

    def op(kind: str, *inputs: str, out: str | None = None, **attributes) -> str:
        out = out or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def weight(name: str, *shape: int, like: np.ndarray | None = None) -> str:
        value = random.standard_normal(shape) / np.sqrt(shape[0]) if like is None else like
        weights[name] = np.asarray(value, dtype if np.asarray(value).dtype.kind == "f" else np.int64)
        return name

    def heads(x: str, count: int) -> str:
        shaped = op("Reshape", x, weight(f"shape{count}", like=np.array([0, 0, count, HEAD_DIM])))
        return op("Transpose", shaped, perm=[0, 2, 1, 3])

    angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = weight("cos", like=np.cos(angles)), weight("sin", like=np.sin(angles))
    steps = op("Shape", "input_ids", start=1, end=2)
    if static:
        write = op("Add", "write_indices", weight("late", like=np.array(fault.get("late", 0))))
        seen = op("Add", op("Add", "write_indices", steps), weight("mask", like=np.array(fault.get("mask", 0))))
    else:
        total = op("Shape", "attention_mask", start=1, end=2)
        scalar = weight("scalar", like=np.array([], np.int64))
        slots = op("Range", *(op("Reshape", x, scalar) for x in (weight("0", like=np.array([0])), total)),
                   weight("1", like=np.array(1)))  # fmt: skip
        rows = op(
            "Unsqueeze",
            op("Slice", slots, op("Neg", steps), weight("end", like=np.array([1 << 30]))),
            weight("axis", like=np.array([1])),
        )
        causal = op("LessOrEqual", slots, op("Add", rows, weight("mask", like=np.array(fault.get("mask", 0)))))
        valid = op("Unsqueeze", op("Cast", "attention_mask", to=TensorProto.BOOL), weight("axes", like=np.array([1, 2])))
        mask = op("And", valid, causal)

    x = op("Gather", weight("embed", VOCAB, HIDDEN), "input_ids")
    for layer in range(LAYERS):
        normed = op("RMSNormalization", x, weight(f"norm.{layer}", like=np.ones(HIDDEN)))
        q, k, v = (
            heads(op("MatMul", normed, weight(f"{name}.{layer}", HIDDEN, count * HEAD_DIM)), count)
            for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = (op("RotaryEmbedding", each, cos, sin, "position_ids") for each in (q, k))
        k, v = (v, k) if fault.get("swap") and layer == 1 else (k, v)
        past = [f"past_key_values.{layer}.{role}" for role in ("key", "value")]
        present = [f"present.{layer}.{role}" for role in ("key", "value")]
        scale = fault.get("scale", 1.0) / np.sqrt(HEAD_DIM)
        if static:
            for new, old, out in zip((k, v), past, present):
                op("TensorScatter", old, new, write, out=out, axis=2, mode="linear")
            attended = op("Attention", q, *present, "", "", "", seen, is_causal=1, scale=scale)
        else:
            for new, old, out in zip((k, v), past, present):
                op("Concat", old, new, out=out, axis=2)
            attended = op("Attention", q, *present, mask, scale=scale)
        merged = op("Reshape", op("Transpose", attended, perm=[0, 2, 1, 3]), weight("merge", like=np.array([0, 0, HIDDEN])))
        x = op("Add", x, op("MatMul", merged, weight(f"o.{layer}", HIDDEN, HIDDEN)))
    if last:
        index = op(
            "Unsqueeze",
            op("Sub", "sequence_lengths", weight("one", like=np.array(1))),
            weight("batch", like=np.array([1])),
        )
        x = op("GatherND", x, index, batch_dims=1)
        x = op("Unsqueeze", x, weight("sequence", like=np.array([1])))
    x = op("RMSNormalization", x, weight("norm", like=np.ones(HIDDEN)))
    op("MatMul", x, weight("head", HIDDEN, VOCAB), out="logits")

    weights["v.1"] = weights["v.1"] * (1 + fault.get("disturb", 0))
    weights["v.1"][0, 0] += fault.get("nan", 0)
    slots = CAPACITY if static else "past"
    cache = [f"{layer}.{role}" for layer in range(LAYERS) for role in ("key", "value")]
    of = helper.make_tensor_value_info
    inputs = [
        of("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        of("position_ids", TensorProto.INT64, ["batch", "sequence"]),
    ]
    inputs += (
        [of("write_indices", TensorProto.INT64, ["batch"])]
        if static
        else [of("attention_mask", TensorProto.INT64, ["batch", "total"])]
    )
    inputs += [of("sequence_lengths", TensorProto.INT64, ["batch"])] if last else []
    inputs += [of(f"past_key_values.{name}", onnx_dtype, ["batch", KV_HEADS, slots, HEAD_DIM]) for name in cache]
    outputs = [of("logits", onnx_dtype, ["batch", 1 if last else "sequence", VOCAB])]
    outputs += [
        of(f"present.{name}", onnx_dtype, ["batch", KV_HEADS, CAPACITY if static else "total", HEAD_DIM]) for name in cache
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    return model


def decoder(static: bool, **given) -> OnnxDecoder:
    """The same, opened."""
    return graph_of(decoder_graph(static, **given), Path(), "static" if static else "growing")

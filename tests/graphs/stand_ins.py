"""Graphs of kinds that only others' files were of: a GPT-2 whose layers keep keys and values in one stacked cache, a BERT as
onnxruntime optimises it, and a decoder over pages. Small, made anew each time, their weights drawn."""

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
HIDDEN, HEADS, WORDS, PLACES, LAYERS = 16, 4, 40, 32, 2


class _Writer:
    def __init__(self) -> None:
        self.random = np.random.default_rng(14)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def weight(self, *shape: int, near: float = 0.0, dtype: type = np.float32) -> str:
        name = f"onnx::Weight_{len(self.weights)}"
        values = self.random.standard_normal(shape) * 0.2 + near
        self.weights.append(numpy_helper.from_array(values.astype(dtype), name))
        return name

    def op(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, f"{kind}_{len(self.nodes)}", domain=domain, **attributes))
        return outputs[0]

    def contrib(self, kind: str, inputs: list[str], outputs: list[str], **attributes) -> str:
        return self.op(kind, inputs, outputs, MICROSOFT, **attributes)

    def scale_and_shift(self) -> list[str]:
        return [self.weight(HIDDEN, near=1.0), self.weight(HIDDEN)]

    def model(self, inputs: list[tuple], outputs: list[tuple], opset: int) -> ModelProto:
        ends = [[helper.make_tensor_value_info(*each) for each in side] for side in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, "main_graph", *ends, self.weights)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="onnxruntime.transformers")


def optimised_bert() -> ModelProto:
    w = _Writer()
    tables = [w.weight(WORDS, HIDDEN), w.weight(PLACES, HIDDEN), w.weight(2, HIDDEN)]
    ids = ["input_ids", "token_type_ids"]
    x = w.contrib(
        "EmbedLayerNormalization", [*ids, *tables, *w.scale_and_shift(), "attention_mask"], ["embedded", "mask_index"],
        epsilon=1e-12,
    )  # fmt: skip
    for n in range(LAYERS):
        projection = [w.weight(HIDDEN, 3 * HIDDEN), w.weight(3 * HIDDEN)]
        context = w.contrib("Attention", [x, *projection, "mask_index"], [f"context_{n}"], num_heads=HEADS)
        out = w.op("MatMul", [context, w.weight(HIDDEN, HIDDEN)], [f"out_{n}"])
        skip = [out, x, *w.scale_and_shift(), w.weight(HIDDEN)]
        attended = w.contrib("SkipLayerNormalization", skip, [f"attended_{n}"], epsilon=1e-12)
        inner = w.op("MatMul", [attended, w.weight(HIDDEN, 4 * HIDDEN)], [f"inner_{n}"])
        inner = w.contrib("BiasGelu", [inner, w.weight(4 * HIDDEN)], [f"gelu_{n}"])
        inner = w.op("MatMul", [inner, w.weight(4 * HIDDEN, HIDDEN)], [f"narrowed_{n}"])
        last = "last_hidden_state" if n == LAYERS - 1 else f"layer_{n}"
        x = w.contrib(
            "SkipLayerNormalization", [inner, attended, *w.scale_and_shift(), w.weight(HIDDEN)], [last], epsilon=1e-12
        )
    tokens = [(name, TensorProto.INT32, ["batch_size", "sequence_length"]) for name in (*ids, "attention_mask")]
    return w.model(tokens, [(x, TensorProto.FLOAT, ["batch_size", "sequence_length", HIDDEN])], 14)


def stacked_gpt2() -> ModelProto:
    w = _Writer()
    x = w.op("Gather", [w.weight(WORDS, HIDDEN), "input_ids"], ["words"], axis=0)
    x = w.op("Add", [x, w.op("Gather", [w.weight(PLACES, HIDDEN), "position_ids"], ["places"], axis=0)], ["embedded"])
    pasts, presents = [], []
    for n in range(LAYERS):
        normed = w.op("LayerNormalization", [x, *w.scale_and_shift()], [f"normed_{n}"], epsilon=1e-5)
        past, present = f"past_{n}", f"present_{n}"
        pasts.append((past, TensorProto.FLOAT, [2, "batch_size", HEADS, "past_seq_len", HIDDEN // HEADS]))
        presents.append((present, TensorProto.FLOAT, [2, "batch_size", HEADS, "total_seq_len", HIDDEN // HEADS]))
        projection = [w.weight(HIDDEN, 3 * HIDDEN), w.weight(3 * HIDDEN)]
        names = [f"context_{n}", present]
        context = w.contrib(
            "Attention", [normed, *projection, "attention_mask", past], names, num_heads=HEADS, unidirectional=1
        )
        out = w.op("MatMul", [context, w.weight(HIDDEN, HIDDEN)], [f"out_{n}"])
        attended = w.op("Add", [w.op("Add", [out, w.weight(HIDDEN)], [f"out_bias_{n}"]), x], [f"attended_{n}"])
        inner = w.op("LayerNormalization", [attended, *w.scale_and_shift()], [f"normed_mlp_{n}"], epsilon=1e-5)
        inner = w.op("MatMul", [inner, w.weight(HIDDEN, 4 * HIDDEN)], [f"inner_{n}"])
        inner = w.contrib("FastGelu", [inner, w.weight(4 * HIDDEN)], [f"gelu_{n}"])
        x = w.op("Add", [w.op("MatMul", [inner, w.weight(4 * HIDDEN, HIDDEN)], [f"narrowed_{n}"]), attended], [f"layer_{n}"])
    x = w.op("LayerNormalization", [x, *w.scale_and_shift()], ["final"], epsilon=1e-5)
    w.op("MatMul", [x, w.weight(HIDDEN, WORDS)], ["logits"])
    tokens = [(name, TensorProto.INT64, ["batch_size", "seq_len"]) for name in ("input_ids", "position_ids")]
    mask = ("attention_mask", TensorProto.INT32, ["batch_size", "total_seq_len"])
    logits = ("logits", TensorProto.FLOAT, ["batch_size", "seq_len", WORDS])
    return w.model([*tokens, mask, *pasts], [logits, *presents], 17)


def paged_decoder() -> ModelProto:
    w, half = _Writer(), np.float16
    pages = [128, 16, HEADS, HIDDEN // HEADS]
    x = w.op("Gather", [w.weight(WORDS, HIDDEN, dtype=half), "input_ids"], ["words"], axis=0)
    parts = [w.op("MatMul", [x, w.weight(HIDDEN, HIDDEN, dtype=half)], [f"{side}_proj"]) for side in "qkv"]
    caches = [f"past_key_values.0.{side}" for side in ("key", "value")]
    rest = ["cumulative_sequence_lengths", "past_sequence_lengths", "block_table"]
    names = ["context", "present.0.key", "present.0.value"]
    w.contrib("PagedAttention", [*parts, *caches, *rest], names, num_heads=HEADS, kv_num_heads=HEADS)
    w.op("MatMul", ["context", w.weight(HIDDEN, WORDS, dtype=half)], ["logits"])
    inputs = [("input_ids", TensorProto.INT64, ["num_tokens"]), (rest[0], TensorProto.INT32, ["batch_plus_1"])]
    inputs += [(rest[1], TensorProto.INT32, ["batch"]), (rest[2], TensorProto.INT32, ["batch", "max_blocks"])]
    inputs += [(name, TensorProto.FLOAT16, pages) for name in caches]
    outputs = [
        ("logits", TensorProto.FLOAT16, ["num_tokens", WORDS]),
        *((name, TensorProto.FLOAT16, pages) for name in names[1:]),
    ]
    return w.model(inputs, outputs, 18)


GRAPHS = {made.__name__: made for made in (optimised_bert, stacked_gpt2, paged_decoder)}

"""Attention with a sink, and with capped scores, as transformers writes them out: both become static, and change nothing."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.decoder_graphs import HEAD_DIM, HEADS, KV_HEADS, decoder_graph
from tests.decoding import decode, largest_error
from tests.test_network_families import network_error, write

CAP = 2.0


def written_out(sinks: bool = False, softcap: float = 0.0, capped_last: bool = False, first: bool = False) -> onnx.ModelProto:
    """The growing decoder with each Attention as products, and with sinks, as gpt-oss has them, its rotary embedding, too.
    `capped_last`: the mask is added before the cap; `first`: the sink is the first column, not the last."""
    model = decoder_graph(static=False)
    nodes, weights, whole = [], {}, list(model.graph.node)

    def op(kind: str, *inputs: str, out: str | None = None, **attributes) -> str:
        out = out or f"written_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def number(value: object, dtype: type = np.int64) -> str:
        name = f"number_{len(weights)}"
        weights[name] = np.asarray(value, dtype)
        return name

    def repeated(tensor: str) -> str:
        sizes = op("Shape", tensor)
        batch, slots = (op("Slice", sizes, number([at]), number([at + 1]), number([0])) for at in (0, 2))
        target = op("Concat", batch, number([KV_HEADS, HEADS // KV_HEADS]), slots, number([HEAD_DIM]), axis=0)
        shape = op("Concat", batch, number([HEADS]), slots, number([HEAD_DIM]), axis=0)
        return op("Reshape", op("Expand", op("Unsqueeze", tensor, number([2])), target), shape)

    def turned(x: str, cos: str, sin: str, positions: str, out: str) -> None:
        cos, sin = (op("Unsqueeze", op("Gather", table, positions), number([1])) for table in (cos, sin))
        parts = (f"{out}_first", f"{out}_second")
        nodes.append(helper.make_node("Split", [x], parts, axis=-1, num_outputs=2))
        less = op("Sub", op("Mul", parts[0], cos), op("Mul", parts[1], sin))
        plus = op("Add", op("Mul", parts[1], cos), op("Mul", parts[0], sin))
        op("Concat", less, plus, out=out, axis=-1)

    for node in whole:
        if sinks and node.op_type == "RotaryEmbedding":
            turned(*node.input, node.output[0])
            continue
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        query, key, value, mask = node.input
        keys = op("Transpose", repeated(key), perm=[0, 1, 3, 2])
        scores = op("Mul", op("MatMul", query, keys), number(HEAD_DIM**-0.5, np.float32))
        bias = op("Where", mask, number(0, np.float32), number(-3e38, np.float32))
        if capped_last:
            scores = op("Add", scores, bias)
        if softcap:
            cap = number(softcap, np.float32)
            scores = op("Mul", op("Tanh", op("Div", scores, cap)), cap)
        if not capped_last:
            scores = op("Add", scores, bias)
        if sinks:
            of_heads = number(np.linspace(-1, 3, HEADS).reshape(1, HEADS, 1, 1), np.float32)
            rows = op("Slice", op("Shape", query), number([0]), number([3]), number([0]))
            column = op("Expand", of_heads, op("Concat", rows, number([1]), axis=0))
            joined = op("Concat", *((column, scores) if first else (scores, column)), axis=-1)
            scores = op("Sub", joined, op("ReduceMax", joined, number([-1]), keepdims=1))
        shares = op("Softmax", scores, axis=-1)
        if sinks:
            ends = (1, 1 << 40) if first else (0, -1)
            shares = op("Slice", shares, *(number([end]) for end in ends), number([3]), number([1]))
        op("MatMul", shares, repeated(value), out=node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(model)
    return model


def counts(path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("sinks", [False, True])
def test_caches_become_static_and_nothing_changes(sinks, tmp_path):
    source = written_out(sinks=sinks, softcap=0.0 if sinks else CAP)
    portable, lowered = write(source, tmp_path)
    found = counts(portable)
    assert found["TensorScatter"] == found["RotaryEmbedding"] == 4
    assert (found["Attention"], found["Softmax"]) == ((0, 2) if sinks else (2, 0))
    assert counts(lowered)["TRT_Attention"] == counts(lowered)["Attention"] == 0
    assert largest_error(decode(source, alone=True), decode(onnx.load(portable), alone=False)) < 1e-5
    assert network_error(portable, lowered) < 1e-5


def test_key_heads_are_read_once(tmp_path):
    portable, _ = write(written_out(sinks=True), tmp_path)
    model = onnx.load(portable)
    readers = Counter(node.op_type for node in model.graph.node for name in node.input if name.startswith("present."))
    assert readers == {"Transpose": 2, "MatMul": 2}
    made = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    products = [made[node.output[0]] for node in model.graph.node if node.op_type == "MatMul" and node.output[0] in made]
    heads = {dims[1].dim_value for value in products if len(dims := value.type.tensor_type.shape.dim) == 4}
    assert heads == {KV_HEADS}


def test_scores_masked_before_they_are_capped_stay(tmp_path):
    """A cap makes of a mask's large negative number one that still counts: that is no Attention."""
    source = written_out(softcap=CAP, capped_last=True)
    portable, _ = write(source, tmp_path)
    assert counts(portable)["Attention"] == counts(portable)["TensorScatter"] == 0
    assert largest_error(decode(source, alone=True), decode(onnx.load(portable), alone=True)) < 1e-5


def test_a_sink_in_front_of_the_scores_stays(tmp_path):
    """A form that is not known: slots are counted from the second column on."""
    source = written_out(sinks=True, first=True)
    portable, _ = write(source, tmp_path)
    assert counts(portable)["TensorScatter"] == 0
    assert counts(portable)["Softmax"] == 2
    assert largest_error(decode(source, alone=True), decode(onnx.load(portable), alone=True)) < 1e-5

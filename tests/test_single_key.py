"""Attention over one key is its value, and TensorRT builds it."""

import onnx
import pytest

import suture
from suture.surgery.passes.lowering import single_key
from suture.testing import check_pass, near_misses


def model(queries: object = 1, keys: int = 1, kv_heads: int = 2, more: str = "") -> onnx.ModelProto:
    """Query, key and value by products of one input each."""
    return onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 24]>
    g (float[1, 2, {queries}, 8] x, float[1, {kv_heads}, {keys}, 8] m) => (float[1, 2, {queries}, 8] y)
    {{ k = Neg(m)  v = Tanh(m)  a = Attention{more}(x, k, v)  y = Relu(a) }}""")


@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_the_value(queries):
    operated = suture.operate(model(queries))
    assert operated.report.proof["status"] == "passed"
    ops = [node.op_type for node in operated.lowered.graph.node]
    assert "Neg" not in ops, "what made the key is gone"
    assert not {"TRT_Attention", "Softmax", "Attention"} & set(ops)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_graph_computes_the_same(queries):
    assert check_pass(single_key.run, model(queries)) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (model("S"), "the number of queries is not fixed"),
        (model(kv_heads=1), "query heads share their values"),
        (model(3, more="<is_causal=1>"), "is_causal=1 is not accounted for"),
    ],
    ids=["queries", "heads", "causal"],
)
def test_near_misses(source, reason):
    assert check_pass(single_key.run, source) == 0
    assert any(reason in each for each in near_misses(single_key.run, source))


def test_two_keys_are_left_alone():
    assert check_pass(single_key.run, model(keys=2)) == 0
    assert near_misses(single_key.run, model(keys=2)) == []

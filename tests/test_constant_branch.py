"""An If whose condition is constant, in the file or once shapes are known: the branch in its place."""

import numpy as np
import onnx
import pytest

import suture
from suture.core.proof.verdict import PASSED
from tests.test_foreign_graphs import run

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
WHOLE = f"""{HEADER} g (float[N, 4] x) => (float[N, 4] y) <bool c = {{FLAG}}> {{
y = If(c) <then_branch = t () => (float[N, 4] p) {{ a = Neg(x)  p = Add(a, x) }},
else_branch = e () => (float[N, 4] q) {{ a = Tanh(x)  q = Mul(a, x) }}> }}"""
OF_A_SHAPE = f"""{HEADER} g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z)
<int64[1] one = {{1}}, int64[1] four = {{4}}, int64[1] two = {{2}}> {{
n = Shape(x)  s = Slice(n, one, two)  c = Equal(s, four)  f = Squeeze(c)  g = Not(f)
y = If(f) <then_branch = t () => (float[N, 4] p) {{ a = Neg(x)  p = Add(a, x) }},
else_branch = e () => (float[N, 4] q) {{ a = Tanh(x)  q = Mul(a, x) }}>
z = If(g) <then_branch = t () => (float[N, 4] p) {{ a = Neg(x)  p = Add(a, y) }},
else_branch = e () => (float[N, 4] q) {{ q = Identity(x) }}> }}"""


def check(model: onnx.ModelProto) -> list[str]:
    """Both proven, no If left; the operators."""
    operated = suture.operate(model)
    assert [pair["status"] for pair in operated.report.proof["pairs"]] == [PASSED, PASSED]
    x = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    expected, found = run(model, x), run(operated.portable, x)
    assert all(np.array_equal(values, found[name]) for name, values in expected.items())
    ops = [node.op_type for node in operated.portable.graph.node]
    assert "If" not in ops
    assert not any("stays as it is" in note for note in operated.report.notes)
    return ops


@pytest.mark.parametrize(("flag", "op"), [("1", "Neg"), ("0", "Tanh")])
def test_all_outputs_of_an_if_with_a_constant_condition(flag, op):
    assert op in check(onnx.parser.parse_model(WHOLE.replace("FLAG", flag)))


def test_conditions_that_shapes_decide_and_names_that_both_branches_have():
    assert sorted(check(onnx.parser.parse_model(OF_A_SHAPE))) == ["Add", "Identity", "Neg"]


def test_an_if_whose_condition_is_an_input_stays_and_is_said():
    text = WHOLE.replace("(float[N, 4] x)", "(float[N, 4] x, bool c)").replace(" <bool c = {FLAG}>", "")
    text = text.replace("=> (float[N, 4] y)  {", "=> (float[N, 4] y, float[N, 4] w) { w = Neg(x)")
    text = text.replace("=> (float[N, 4] y) {", "=> (float[N, 4] y, float[N, 4] w) { w = Neg(x)")
    operated = suture.operate(onnx.parser.parse_model(text))
    assert any("stays as it is, with 2 nodes inside" in note for note in operated.report.notes)

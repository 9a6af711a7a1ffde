"""Integers that TensorRT has no type for, and loops that it has no counter for, in the lowered graph: exact, parsed and built."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import suture
from suture.build.options import BuildOptions
from suture.build.stage import ENGINE, build
from suture.core.network.check import check
from suture.core.proof.verdict import PASSED, DifferenceFound
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes.lowering import zero_points
from tests.graphs.qdq import KINDS, quantised_convolution

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("QuantizeLinear", "DequantizeLinear")


def proven(model: onnx.ModelProto):
    """Surgery's result, of which both graphs must be proven on inputs."""
    operated = suture.operate(model)
    assert [pair["status"] for pair in operated.report.proof["pairs"]] == [PASSED, PASSED]
    return operated


def found(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("name", "native"), [(name, native) for name, (_, native) in KINDS.items()])
def test_a_quantised_convolution_is_int8_around_zero_where_that_is_exact(name, native):
    lowered = proven(quantised_convolution(**KINDS[name][0])).lowered
    assert sum(found(lowered)[op] for op in BOTH) == native
    kinds = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    zeros = [node.input[2] for node in lowered.graph.node if node.op_type in BOTH and len(node.input) > 2]
    assert {kinds[each] for each in zeros} <= {TensorProto.INT8}


def test_the_engine_of_one_is_built(tmp_path):
    operated = proven(quantised_convolution(**KINDS["uint8 around 117"][0]))
    onnx.save(operated.lowered, tmp_path / "model.trt.onnx")
    build(tmp_path / "model.trt.onnx", tmp_path / "build", BuildOptions(compute_capability=("8.9",)))
    assert (tmp_path / "build" / ENGINE).stat().st_size > 0


def test_a_zero_point_that_is_left_out_is_seen(monkeypatch):
    """The proof finds (q - z) * s without z."""
    written = zero_points._dequantise
    monkeypatch.setattr(
        zero_points, "_dequantise", lambda graph, node, scale, zero, dtype: written(graph, node, scale, zero * 0, dtype)
    )
    with pytest.raises(DifferenceFound):
        proven(quantised_convolution(**KINDS["uint8 around 117"][0]))


def test_integers_that_are_computed_with_stay():
    source = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y, uint8[4] z)
    <float s = {0.1}, uint8 p = {3}> { q = QuantizeLinear(x, s, p)  z = BitwiseNot(q)  y = DequantizeLinear(q, s, p) }""")
    operated = operate(source, SurgeryOptions())
    assert found(operated.lowered)["QuantizeLinear"] == 1
    report = operated.report.passes
    misses = [miss.reason for each in report for miss in each.near_misses if each.name == "zero_points"]
    assert any("BitwiseNot" in reason and "computes with its integers" in reason for reason in misses)


LOOP = """<ir_version: 10, opset_import: ["": 18]> g (float[1] x, float[2] z) => (float[1] y, float[2] u)
<int64 most = {MOST}, bool yes = {1}, int64 last = {3}> {
y, u = Loop(most, yes, x, z) <body = b (int64 i, bool c, float[1] v, float[2] s) => (bool d, float[1] w, float[2] t) {
f = Cast<to = 1>(i)  w = Add(v, f)  t = Mul(s, w)  d = Less(i, last) }> }"""


@pytest.mark.parametrize("most", [str(2**63 - 1), str(2**31 - 1), "2"])
def test_a_loop_without_an_end_of_its_own_counts_its_rounds(most):
    lowered = proven(onnx.parser.parse_model(LOOP.replace("MOST", most))).lowered
    loop = next(node for node in lowered.graph.node if node.op_type == "Loop")
    assert len(loop.input) == (4 if most == "2" else 5)


@pytest.mark.parametrize(("count", "yes"), [("n", ""), ("most", ""), ("n", "yes")])
def test_a_loop_without_a_condition_has_one(count, yes, tmp_path):
    """And one that runs as often as an input says depends on that input."""
    text = LOOP.replace("MOST", "3").replace("Loop(most, yes,", f"Loop({count}, {yes},").replace("z)", "z, int64 n)", 1)
    source = onnx.parser.parse_model(text.replace("d = Less(i, last)", "d = Identity(c)"))
    lowered = proven(source).lowered
    assert all(next(node for node in lowered.graph.node if node.op_type == "Loop").input[1:])
    onnx.save(lowered, tmp_path / "model.onnx")
    assert check(tmp_path / "model.onnx").errors == []


def test_both_branches_of_an_if_are_compared(tmp_path):
    """TensorRT declares a result of the one's shape alone, and would give the other's with it."""
    source = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]> g (float[1,4] x, bool c) => (float y) { y = If(c) <
    then_branch = a () => (float[4] p) <int64[1] first = {0}> { p = Squeeze(x, first) },
    else_branch = b () => (float[1,4] q) { q = Identity(x) }> }""")
    with pytest.raises(DifferenceFound, match=r"c (true|false)"):
        suture.operate(source)
    onnx.save(source, tmp_path / "model.onnx")
    checked = check(tmp_path / "model.onnx")
    assert checked.verdict == "different"


def test_a_mask_in_uint8_is_cast_before_it_is_cut():
    source = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
    g (float[S, S] x) => (float[S, S] y) <int64[2] z = {0, 0}, int64[2] a = {0, 1}, float low = {-1000}> {
    n = Shape(x)  m = Slice(w, z, n, a)  b = Cast<to = 9>(m)  y = Where(b, x, low) }""")
    triangle = np.tril(np.ones((16, 16), np.uint8))
    source.graph.initializer.append(numpy_helper.from_array(triangle, "w"))
    lowered = proven(source).lowered
    assert {tensor.data_type for tensor in lowered.graph.initializer} & {TensorProto.UINT8} == set()
    assert found(lowered)["Cast"] == 0
    assert TensorProto.BOOL in {tensor.data_type for tensor in lowered.graph.initializer if list(tensor.dims) == [16, 16]}

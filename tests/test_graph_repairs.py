"""What surgery repairs in a source that is not valid, and lists; what it refuses, in one line."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.network.check import check
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import parse
from suture.core.onnx_checks import check_model
from suture.core.proof.prove import compare_two
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import PASSED
from suture.core.repairs import repair
from suture.core.tensors import misplaced, to_raw
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.validate.check import check_network
from tests.test_foreign_graphs import run

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def model(text: str, imports: str = '"": 18') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> g {text}")


def casts(graph: onnx.GraphProto) -> list[tuple[str, int]]:
    return [(node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]


MIXED = {
    "LayerNormalization": "(float16[B,4] x) => (float16[B,4] y) <float[4] s = {1, 2, 3, 4}> { y = LayerNormalization(x, s) }",
    "Concat": "(float16[B,4] x, float[B,4] z) => (float[B,8] y) { y = Concat<axis = 1>(x, z) }",
    "Gemm": "(float16[B,2] x) => (float16[B,1] y) <float[2,1] w = {0.3, 0.7}> { y = Gemm(x, w) }",
}


@pytest.mark.parametrize("operator", MIXED)
def test_a_file_of_mixed_types_is_repaired_before_its_types_are_checked(operator, tmp_path):
    """And what surgery writes of it differs by no more than rounding."""
    onnx.save(model(MIXED[operator]), tmp_path / "model.onnx")
    operated = operate(tmp_path / "model.onnx", SurgeryOptions(no_verify=True))
    assert any(line.startswith(operator) and "mixes float and float16: a Cast to" in line for line in operated.report.lines())
    check_model(operated.portable, "here")
    again = compare_two(operated.source, Subject(operated.portable, operated.signature, operated.root))
    assert again.status == PASSED, again.said


def test_a_contrib_operator_of_mixed_types_is_the_sources_fault():
    text = "(float16[B,4] x) => (float16[B,4] y) <float[4] s = {1, 2, 3, 4}> { y = com.microsoft.SkipLayerNormalization(x, x, s, s) }"
    with pytest.raises(UserError, match="onnxruntime does not load it"):
        operate(model(text, '"": 18, "com.microsoft": 1'))


def test_a_number_follows_the_tensor_beside_it():
    source = model("(float16[2] x) => (float16[2] y) <float two = {2}> { y = Mul(x, two) }")
    notes = repair(source, "here")
    assert notes == ["Mul that makes y mixes float and float16: a Cast to float16"]
    assert casts(source.graph) == [("two", HALF)]
    assert run(source, {"x": np.ones(2, np.float16)})["y"].tolist() == [2, 2]


def test_of_two_tensors_the_narrower_one_is_widened_unless_the_graph_declares_the_result():
    source = model("(float16[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }")
    repair(source, "here")
    assert casts(source.graph) == [("x", FLOAT)]
    declared = model("(float16[2] x, float[2] w) => (float16[2] y) { y = Mul(x, w) }")
    repair(declared, "here")
    assert casts(declared.graph) == [("w", HALF)]


def test_an_output_of_another_type_than_it_is_declared_is_cast():
    source = model("(float16[2] x) => (float[2] y) <float other = {1}> { y = Neg(x) }")
    assert repair(source, "here") == ["the output y is computed in another type than it is declared: a Cast"]
    assert run(source, {"x": np.ones(2, np.float16)})["y"].dtype == np.float32


def test_a_domain_of_known_version_is_imported_and_no_other():
    source = model("(float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }")
    assert repair(source, "here") == ["the source does not import com.microsoft, whose operators it uses: version 1 is taken"]
    assert {(entry.domain, entry.version) for entry in source.opset_import} == {("", 18), ("com.microsoft", 1)}
    with pytest.raises(UserError, match="opset_import does not say"):
        repair(model("(float[2] x) => (float[2] y) { y = some.body.Gelu(x) }"), "here")


@pytest.mark.parametrize(("ir", "opset"), [(7, 14), (9, 20), (10, 22), (13, 24)])
def test_the_standard_is_imported_where_its_operators_leave_one_meaning(ir, opset, tmp_path):
    source = model("(float[2] x) => (float[2] y) { y = Add(x, x) }")
    source.ir_version = ir
    del source.opset_import[:]
    onnx.save(source, tmp_path / "model.onnx")
    operated = operate(tmp_path / "model.onnx")
    said = f"the source does not import ai.onnx, whose operators it uses: version {opset} is taken"
    assert [note for note in operated.report.notes if "import" in note] == [said]
    assert run(operated.portable, {"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


def test_the_standard_is_not_imported_where_an_operator_has_changed(tmp_path):
    source = model("(float[2] x) => (float[2] y) { a = Add(x, x)  y = Softmax(a) }")
    del source.opset_import[:]
    onnx.save(source, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="opset_import does not say, and Softmax is not the same in all of them"):
        operate(tmp_path / "model.onnx")


def test_of_two_constants_that_write_one_tensor_the_last_is_taken_as_onnxruntime_does(tmp_path):
    source = model("(float[1] x) => (float[1] y) { y = Add(x, x) }")
    constants = [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([n]))) for n in (2, 3)]
    source.graph.node.insert(0, constants[0])
    source.graph.node.extend([constants[1]])
    source.graph.node[1].input[1] = "c"
    onnx.save(source, tmp_path / "model.onnx")
    x = {"x": np.ones(1, np.float32)}
    assert run(source, x)["y"].tolist() == [4]
    operated = operate(tmp_path / "model.onnx")
    assert "two Constants write c: the last is taken, as onnxruntime does" in operated.report.notes
    assert run(operated.portable, x)["y"].tolist() == [4]


def test_two_nodes_of_one_name_get_a_name_each():
    source = model("(float[2] x) => (float[2] y) { [n] a = Neg(x) [n_2] b = Neg(a) [n] y = Neg(b) }")
    (note,) = repair(source, "here")
    assert note.startswith("2 nodes of the source are called n")
    assert sorted(node.name for node in source.graph.node) == ["n", "n_2", "n_3"]


@pytest.mark.parametrize("operator", ["BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"])
def test_generation_inside_a_graph_is_refused_by_name(operator):
    source = model(f"(int64[2] x) => (int64[2] y) {{ y = com.microsoft.{operator}(x) }}")
    with pytest.raises(UserError, match=f"com.microsoft.{operator}") as refusal:
        repair(source, "here")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.FLOAT8E4M3FN])
def test_bytes_in_int32_data_are_what_they_are_in_tensorrt(dtype, tmp_path):
    """Of which the parser takes every fourth."""
    source = model("(float[6] x) => (float[6] y) { c = Cast<to = 1>(w) y = Mul(c, x) }", '"": 24')
    source.graph.initializer.append(helper.make_tensor("w", dtype, [6], [1, 0, 1, 1, 0, 1]))
    x = np.arange(1, 7, dtype=np.float32)
    found = []
    for written in (source, operate(source).lowered):
        onnx.save(written, tmp_path / "model.onnx")
        found.append(Evaluator(parse(tmp_path / "model.onnx"), "cpu")({"x": x})["y"].numpy())
    assert not np.array_equal(found[0], x * [1, 0, 1, 1, 0, 1])  # else this is no longer needed
    assert np.array_equal(found[1], x * [1, 0, 1, 1, 0, 1])
    assert misplaced(source.graph.initializer[0])


def test_values_stay_when_they_move_to_raw_data():
    source = model("(float[2] x) => (float[2] y) { y = Neg(x) }")
    source.graph.initializer.append(helper.make_tensor("w", TensorProto.UINT8, [3], [1, 200, 255]))
    to_raw(source)
    assert numpy_helper.to_array(source.graph.initializer[0]).tolist() == [1, 200, 255]


@pytest.mark.parametrize("name", ["int", "double", "inside"])
def test_types_that_torch_promotes_are_cast_in_all_graphs(name, tmp_path):
    inside = "(float16[2] x, bool c) => (float16[2] z) { y = If(c) <then_branch = a () => (float16[2] p) <float s = {2}> " \
        "{ p = Mul(x, s) }, else_branch = b () => (float16[2] q) { q = Neg(x) }> z = Relu(y) }"  # fmt: skip
    source, wide = {
        "int": (model("(int32[2] x) => (int32[2] y) <int64 s = {3}> { y = Add(x, s) }"), "int32 and int64: a Cast to int32"),
        "double": (
            model("(float[2] x) => (float[2] y) <double s = {3}> { y = Mul(x, s) }"),
            "double and float: a Cast to float",
        ),
        "inside": (model(inside), "float and float16: a Cast to float16"),
    }[name]
    onnx.save(source, tmp_path / "model.onnx")
    checked = check(tmp_path / "model.onnx")
    assert checked.verdict == "agrees"
    operated = operate(tmp_path / "model.onnx")
    for repairs in (checked.repairs, operated.report.notes):
        assert any(line.endswith(f"mixes {wide}") for line in repairs)


def test_a_weight_that_stands_twice_is_one_where_its_values_are_the_same(tmp_path):
    source = model("(float[2] x) => (float[2] y) <float s = {3}> { y = Mul(x, s) }")
    source.graph.initializer.append(source.graph.initializer[0])
    onnx.save(source, tmp_path / "model.onnx")
    said = "the source has the weight s twice, with the same values: one is taken"
    checked = check(tmp_path / "model.onnx")  # TensorRT's parser takes none of two
    assert (checked.verdict, checked.repairs) == ("agrees", [said])
    assert said in operate(tmp_path / "model.onnx").report.notes
    source.graph.initializer[1].float_data[0] = 4
    onnx.save(source, tmp_path / "model.onnx")
    for read in (check, operate):
        with pytest.raises(UserError, match="not unique"):
            read(tmp_path / "model.onnx")


def test_a_type_that_is_declared_and_not_computed_is_left_out():
    source = model("(float[2] x) => (float[2] y) { a = Neg(x) y = Relu(a) }")
    source.graph.value_info.append(helper.make_tensor_value_info("a", HALF, [2]))
    assert repair(source, "here") == ["what the source says of the type of a is not what its node gives: it is left out"]
    assert not source.graph.value_info


def test_check_says_what_it_repaired(tmp_path, capsys):
    onnx.save(model("(float16[2] x) => (float16[2] y) <float s = {3}> { y = Mul(x, s) }"), tmp_path / "model.onnx")
    assert check_network(tmp_path / "model.onnx") == 0
    assert "repaired  Mul that makes y mixes float and float16: a Cast to float16" in capsys.readouterr().out

"""The proof with which surgery ends: what it catches, what it says it did not compare, and that validate takes it over."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from graphs import weightless
from onnx import numpy_helper

import suture
from suture.core.network import parse
from suture.core.network.parse import NO_TENSORRT
from suture.core.proof import excerpt as excerpts
from suture.core.proof import prove as proving
from suture.core.proof.nudged import with_numbers_nudged
from suture.core.proof.prove import prove
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN, PASSED, DifferenceFound
from suture.core.sessions import new_session, run_arrays
from suture.core.shadow_copy import float32_shadow_copy, has_types
from suture.core.signature import find_signature
from suture.surgery.__main__ import main
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.validate import proven
from suture.validate.pipeline import find_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
OWN = '''"""A fault."""
import numpy as np
import onnx_graphsurgeon as gs


def run(graph):
    done = []
    for node in graph.gs.nodes:
        if not done and node.op == "{op}":
            {change}
            done.append(node)
    return len(done)
'''


def without_caches(dtype: str = "float", **changed: float) -> onnx.ModelProto:
    """A causal decoder of one layer without caches: norm, projections, attention, a gated product.

    `changed`: epsilon of the norm, and a factor on the weights."""
    text = (
        f'<ir_version: 11, opset_import: ["" : 24]> g ({dtype}[B, S, 32] x) => ({dtype}[B, S, 32] y) '
        f"{{ n = RMSNormalization <axis = -1, epsilon = {changed.get('epsilon', 1e-6):.9f}> (x, norm) "
        "q0 = MatMul(n, wq) k0 = MatMul(n, wk) v0 = MatMul(n, wv) "
        "q = Attention <q_num_heads = 4, kv_num_heads = 4, is_causal = 1> (q0, k0, v0) "
        "o = MatMul(q, wo) r = Add(x, o) g = MatMul(r, wg) s = Sigmoid(g) a = Mul(g, s) d = MatMul(a, wd) y = Add(r, d) }"
    )
    model = onnx.parser.parse_model(text)
    random, kind = np.random.default_rng(0), {"float": np.float32, "float16": np.float16}[dtype]
    model.graph.initializer.append(numpy_helper.from_array(np.ones(32, kind), "norm"))
    for name in ("wq", "wk", "wv", "wo", "wg", "wd"):
        values = random.standard_normal((32, 32)) / np.sqrt(32)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(kind), name))
    return model


def own_pass(folder: Path, op: str, change: str) -> str:
    path = folder / "fault.py"
    path.write_text(OWN.format(op=op, change=change))
    return str(path)


FAULTS = {
    "a scale": ("Attention", "node.attrs['scale'] = 1.004 * node.attrs.get('scale', 8 ** -0.5)"),
    "a causal flag": ("Attention", "node.attrs['is_causal'] = 0"),
    "a cap": ("Attention", "node.attrs['softcap'] = 5.0"),
    "a swapped pair": ("Attention", "node.inputs[0], node.inputs[1] = node.inputs[1], node.inputs[0]"),
    "an epsilon three times as large": ("RMSNormalization", "node.attrs['epsilon'] = 3 * node.attrs['epsilon']"),
    "an epsilon of 1e-5": ("RMSNormalization", "node.attrs['epsilon'] = 1e-5"),
    "a weight": (
        "MatMul",
        "w = node.inputs[1].values.astype(np.float32); noise = np.random.default_rng(1).standard_normal(w.shape); "
        "node.inputs[1].values = (w + 0.004 * w.std() * noise).astype(node.inputs[1].values.dtype)",
    ),
}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_graph_without_caches_is_found(fault, dtype, tmp_path):
    op, change = FAULTS[fault]
    options = {"own": (own_pass(tmp_path, op, change),), "skip": ("linear",)}
    with pytest.raises(
        DifferenceFound, match=r"Exported ↔ portable graph: different: .* in float32; (first at|no intermediate)"
    ):
        suture.operate(without_caches(dtype), **options)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_without_a_fault_none_is_found(dtype):
    proof = suture.operate(without_caches(dtype)).report.proof
    assert (proof["status"], proof["complete"]) == (PASSED, True)
    kinds = ["float32"] + ["float16"] * (dtype == "float16")
    assert [[each["dtype"] for each in pair["comparisons"]] for pair in proof["pairs"]] == [kinds, kinds]
    assert all(len(each["steps"]) >= 3 for pair in proof["pairs"] for each in pair["comparisons"])


@pytest.mark.parametrize("fault", [{"scale": 1.004}, {"mask": 1}, {"swap": True}, {"late": 1}, {"disturb": 4e-3}])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_fault_in_a_static_cache_is_found(fault, dtype):
    models = decoder_graph(False, dtype), decoder_graph(True, dtype, **fault)
    source, portable = (Subject(model, find_signature(model), Path()) for model in models)
    pair = prove(source, portable, portable.model).pairs[0]
    assert (pair.status, pair.comparisons[-1].dtype) == (DIFFERENT, "float32")


@pytest.mark.parametrize("fault", [{"scale": 1.004}, {"mask": 1}, {"swap": True}, {"disturb": 4e-3}])
def test_a_fault_of_lowering_is_found(fault):
    good = operate(decoder_graph(False), SurgeryOptions(capacity=64))
    wrong = operate(decoder_graph(False, **fault), SurgeryOptions(capacity=64))
    proof = prove(good.source, Subject(good.portable, good.signature, good.root), wrong.lowered)
    assert [pair.status for pair in proof.pairs] == [PASSED, DIFFERENT]
    assert "TensorRT's network" in proof.headline


def test_a_rounded_number_is_no_difference_and_a_wrong_one_is():
    """A float16 graph's 1.414 stands for √2, which Gelu has exactly."""
    source = weightless.filled(onnx.load(weightless.FOLDER / "vision" / "sd15_tblock_f16_d18.onnx", load_external_data=False))
    nudged = float32_shadow_copy(with_numbers_nudged(source), HALVES)
    assert not has_types(nudged, HALVES)
    operated = operate(source)
    portable = Subject(operated.portable, operated.signature, operated.root)
    exact = prove(operated.source, portable, operated.lowered).pairs[0]
    assert (exact.status, proving.EXACT < exact.comparisons[0].tolerance < 1e-3) == (PASSED, True)
    weight = next(tensor for tensor in operated.portable.graph.initializer if len(tensor.dims) == 2)
    values = numpy_helper.to_array(weight).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(values.shape)
    changed = (values + 0.02 * values.std() * noise).astype(np.float16)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    assert prove(operated.source, portable, operated.lowered).pairs[0].status == DIFFERENT


def test_an_output_that_is_an_input_has_memory_of_its_own():
    """onnxruntime gives the feed's, which is freed as soon as the run has ended."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N] x) => (float[N] x, float[N] y) { y = Neg(x) }'
    )
    feed = np.arange(5, dtype=np.float32)
    x, y = run_arrays(new_session(model), ["x", "y"], {"x": feed})
    np.testing.assert_array_equal(x, feed)
    np.testing.assert_array_equal(y, -feed)
    assert not np.may_share_memory(x, feed)


# --- as a stage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "out" / "export"
    folder.mkdir(parents=True)
    onnx.save(decoder_graph(static=False), folder / "model.onnx")
    return folder / "model.onnx"


def surgery(model: Path, *options: str) -> int:
    return main([str(model), "--out", str(model.parents[1] / "surgery"), "--capacity", "64", *options])


def test_the_verdict_stands_in_report_and_manifest(model, capsys):
    assert surgery(model) == 0
    out = model.parents[1] / "surgery"
    assert "surgery: proven in" in capsys.readouterr().out.splitlines()[-1]
    manifest, report = (json.loads((out / name).read_text()) for name in ("manifest.json", "report.json"))
    assert manifest["proof"]["status"] == report["proof"]["status"] == PASSED
    assert manifest["proof"]["sha256"] == {
        name: manifest["content"][name]["sha256"] for name in ("model.onnx", "model.trt.onnx")
    }


def test_a_difference_ends_with_1_and_leaves_the_graphs(model, tmp_path, capsys):
    fault = own_pass(tmp_path, "Attention", "node.attrs['scale'] = 0.4")
    assert surgery(model, "--pass", fault) == 1
    out = model.parents[1] / "surgery"
    assert not (out / "model.onnx").exists()
    assert {"model.onnx", "model.trt.onnx"} <= {path.name for path in (out / "difference").iterdir()}
    said = capsys.readouterr().out
    assert "first at the Attention" in said
    assert surgery(model) == 0
    assert not (out / "difference").exists()


def test_nothing_proven_is_said(model, monkeypatch, capsys):
    assert surgery(model, "--no-verify") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "surgery: not proven: --no-verify"

    def none(*_):
        raise NO_TENSORRT

    monkeypatch.setattr(parse.ParserProcess, "parse", none)
    assert surgery(model) == 0
    assert "not proven: Portable graph ↔ TensorRT's network: no TensorRT" in capsys.readouterr().out.splitlines()[-1]


def test_what_the_parser_refuses_is_written_and_is_no_success(tmp_path, capsys):
    text = '<ir_version: 10, opset_import: ["" : 18]> g (int32[N] x, int32[N] z) => (int32[N] y) { y = BitwiseAnd(x, z) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    for _ in range(2):  # the second is up to date
        assert main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]) == 1
        assert (tmp_path / "out" / "model.onnx").is_file()
        assert FAILED in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["proof"]["pairs"][0]["status"] == PASSED


def test_an_input_that_the_parser_makes_up_is_no_success(tmp_path, capsys):
    """Of a condition that a loop's body hands on, it makes an input of the network, named as in the body."""
    text = """<ir_version: 10, opset_import: ["" : 18]> g (int64 n, bool c, float[1] x) => (float[1] y)
        { y = Loop(n, c, x) <body = b (int64 i, bool inside, float[1] v) => (bool on, float[1] w)
            { on = Identity(inside) w = Add(v, v) }> }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]) == 1
    assert "TensorRT's parser makes an input of inside, which is none" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["proof"]["pairs"][0]["status"] == PASSED


def test_a_graph_of_an_output_alone_stays_one(tmp_path):
    value, table = onnx.helper.make_tensor_value_info("y", 1, [2]), onnx.helper.make_tensor("y", 1, [2], [1.0, 2.0])
    graph = onnx.helper.make_graph([], "g", [], [value], [table])
    source = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(source, tmp_path / "model.onnx")
    operated = suture.operate(tmp_path / "model.onnx")
    assert not operated.portable.graph.node
    assert [pair["status"] for pair in operated.report.proof["pairs"]] == [PASSED, PASSED]


def test_random_numbers_are_not_compared():
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { r = RandomNormalLike(x) y = Add(x, r) }'
    proof = suture.operate(onnx.parser.parse_model(text)).report.proof
    assert [pair["status"] for pair in proof["pairs"]] == [NOT_RUN, NOT_RUN]
    assert "draws random numbers" in proof["pairs"][0]["reason"]


def test_bytes_are_written_as_tensorrt_reads_them():
    """Kept as int32_data, of which TensorRT's parser takes every byte for a number."""
    table = onnx.helper.make_tensor("t", onnx.TensorProto.UINT8, [2, 4], [1, 0, 0, 0, 1, 1, 0, 0])
    assert table.int32_data
    text = (
        '<ir_version: 10, opset_import: ["" : 18]> g (int64[N] i) => (float[N, 4] y) { r = Gather(t, i) y = Cast<to = 1>(r) }'
    )
    source = onnx.parser.parse_model(text)
    source.graph.initializer.append(table)
    operated = suture.operate(source)
    assert operated.report.proof["status"] == PASSED
    assert not any(tensor.int32_data for tensor in operated.lowered.graph.initializer)


def test_a_large_graph_is_proven_by_its_first_layers(monkeypatch):
    monkeypatch.setattr(proving, "is_large", lambda graph: True)
    proof = suture.operate(decoder_graph(False), capacity=64).report.proof
    assert (proof["status"], proof["complete"]) == (PASSED, False)
    outputs = set(proof["pairs"][1]["comparisons"][0]["steps"][0]["errors"])
    assert outputs == {f"{role} cache of layer {layer}" for role in ("key", "value") for layer in (0, 1)}
    assert "the last norm and the logits" in proof["pairs"][0]["left_out"][0]


def test_tokens_are_those_whose_rows_a_large_graph_keeps(tmp_path, monkeypatch):
    """Of a table in a file the first rows alone are looked up."""
    path = tmp_path / "model.onnx"
    onnx.save(decoder_graph(False), path, save_as_external_data=True, location="weights", size_threshold=0)
    monkeypatch.setattr(proving, "is_large", lambda graph: True)
    monkeypatch.setattr(excerpts, "ROWS", 4)
    assert suture.operate(path, capacity=64).report.proof["status"] == PASSED


# --- validate ---------------------------------------------------------------------------------------------------------------


def test_validate_takes_the_verdict_over_until_a_byte_changes(model):
    assert surgery(model) == 0
    files = find_pipeline(model.parents[1], None).parts[0]
    pairs = proven.recorded(files)
    assert [proven.level_of(pairs[number]).status for number in (2, 3)] == [PASSED, PASSED]
    graph = onnx.load(model)
    scaled = next(node for node in graph.graph.node if node.op_type == "Attention")
    next(each for each in scaled.attribute if each.name == "scale").f *= 1.004
    onnx.save(graph, model)
    assert proven.recorded(files) == {}
    found = proven.compared_here(files)
    assert (found[2].status, found[3].status) == (DIFFERENT, PASSED)


def test_the_verdict_of_other_libraries_is_not_taken_over(model, monkeypatch):
    assert surgery(model) == 0
    files = find_pipeline(model.parents[1], None).parts[0]
    monkeypatch.setattr(proven, "versions", lambda package: {"onnxruntime": "0"})
    assert proven.recorded(files) == {}

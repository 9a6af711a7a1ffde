"""Surgery on Suture's own export of tiny-qwen: what becomes of it, what it refuses, and when it has nothing to do."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from suture.core import command
from suture.core.manifest import read_manifest
from suture.core.signature import find_signature
from suture.core.weights import load_graph, references, weights_root
from suture.runtime.graphs import open_graph
from suture.surgery.__main__ import main
from suture.validate.compare import compare
from suture.validate.scenarios import make_scenarios, random_tokens

LAYERS, CAPACITY = 4, 336  # the model's trained length is 256: dynamic NTK is at work in the last slots


def operate(model: Path, out: Path, *options: str) -> dict:
    """Runs surgery, without its proof, and returns its report."""
    assert main([str(model), "--out", str(out), "--no-verify", *options]) == 0
    return json.loads((out / "report.json").read_text())


def refusal(capsys, *arguments: object) -> str:
    """The one line that unusable input ends with."""
    with pytest.raises(SystemExit) as ended:
        command.run("surgery", lambda: main([str(argument) for argument in arguments]))
    assert ended.value.code == command.UNUSABLE_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    return line


def assert_equal(reference: Path, candidate: Path, trained_length: int | None = None) -> None:
    """Prompts, chunks, ragged batches; with `trained_length` also beyond it, and to the last slot of a static cache."""
    graphs = open_graph(reference), open_graph(candidate)
    capacity = graphs[1].capacity if trained_length else None
    comparison = compare(*graphs, make_scenarios(random_tokens(graphs[0].vocab, 0), capacity, trained_length))
    assert comparison.status == "passed", comparison
    assert all(scenario.status == "passed" for scenario in comparison.scenarios)
    assert comparison.tolerance == 1e-4


@pytest.fixture(scope="module")
def exported(tiny_export) -> Path:
    return tiny_export / "model.onnx"


@pytest.fixture(scope="module")
def operated(exported, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("operated")
    operate(exported, out, "--capacity", str(CAPACITY))
    return out


def test_everything_is_fused(operated):
    report = json.loads((operated / "report.json").read_text())
    before, after = report["ops"]["before"], report["ops"]["portable"]
    assert before["Softmax"] == LAYERS
    assert after["Attention"] == LAYERS
    assert after["RMSNormalization"] == 2 * LAYERS + 1
    assert after["RotaryEmbedding"] == 2 * LAYERS
    assert after["TensorScatter"] == 2 * LAYERS
    assert after["Swish"] == LAYERS
    assert after["Gemm"] == 5 * LAYERS + 1  # q, k and v are one, as in the checkpoint
    assert not {"Softmax", "ReduceMean", "Sigmoid", "MatMul"} & set(after)
    assert report["unfused"] == []
    assert report["nodes"]["portable"] < report["nodes"]["before"] / 2


def test_both_graphs_are_standard(exported, operated):
    for model in (exported, operated / "model.onnx"):
        onnx.checker.check_model(str(model), full_check=True)
    names = [node.name for node in onnx.load(operated / "model.onnx", load_external_data=False).graph.node]
    assert len(set(names)) == len(names)
    assert sum(name.endswith("/attention") for name in names) == LAYERS
    assert {f"layers.{layer}/attention" for layer in range(LAYERS)} < set(names)
    assert {f"layers.{layer}/attn.c_attn" for layer in range(LAYERS)} < set(names)
    assert not [name for name in names if "node_" in name or name.startswith(("/", "transformer."))]
    lowered = onnx.load(operated / "model.trt.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "TRT_Attention" for node in lowered) == LAYERS
    assert not any(node.op_type == "Attention" and len(node.input) > 6 for node in lowered)


def test_it_computes_the_same(exported, operated):
    assert_equal(exported, operated / "model.onnx", trained_length=256)


def test_signature_is_the_static_one(operated):
    signature = find_signature(load_graph(operated / "model.onnx"))
    assert (signature.capacity, signature.mask, signature.write_indices) == (CAPACITY, None, "write_indices")
    assert len(signature.caches) == 2 * LAYERS


def test_small_weights_lie_beside_the_graph(exported, operated):
    weights = operated / "model.safetensors"
    assert weights.read_bytes() == (exported.parent / "model.safetensors").read_bytes()
    assert weights.stat().st_nlink == 1  # onnx reads no file with two names
    sizes = [(operated / name).stat().st_size for name in ("model.onnx", "model.trt.onnx")]
    assert max(sizes) < 100_000
    assert read_manifest(operated)["weights_root"] == "."


def test_weights_by_reference_stay_where_they_are(exported, tmp_path):
    """A root folder of weights other than the graph's, recorded by export, is recorded again."""
    elsewhere, source, out = tmp_path / "checkpoint", tmp_path / "export", tmp_path / "deep" / "out"
    elsewhere.mkdir()
    source.mkdir()
    shutil.copy(exported.parent / "model.safetensors", elsewhere)
    shutil.copy(exported, source / "model.onnx")
    manifest = {"outputs": {"model.onnx": 0}, "weights_root": "../checkpoint"}
    (source / "manifest.json").write_text(json.dumps(manifest))
    operate(source / "model.onnx", out, "--capacity", "32")
    assert not list(out.glob("*.safetensors"))
    assert weights_root(out / "model.onnx") == elsewhere
    places = {entry["location"] for _, entry in references(load_graph(out / "model.trt.onnx"))}
    assert places == {"model.safetensors"}
    assert open_graph(out / "model.onnx").capacity == 32


def test_last_logits(exported, tmp_path):
    operate(exported, tmp_path, "--logits", "last", "--capacity", "64")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    logits = next(value for value in graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1
    assert "sequence_lengths" in {value.name for value in graph.input}
    assert_equal(exported, tmp_path / "model.onnx")


def test_growing_cache(exported, tmp_path):
    report = operate(exported, tmp_path, "--cache", "growing")
    assert report["ops"]["portable"]["Attention"] == LAYERS
    assert "TensorScatter" not in report["ops"]["portable"]
    assert_equal(exported, tmp_path / "model.onnx")


def test_skip(exported, tmp_path):
    report = operate(exported, tmp_path, "--skip", "rms_norm", "--skip", "static_cache", "--skip", "attention_mask")
    assert report["ops"]["portable"]["ReduceMean"] == 2 * LAYERS + 1
    assert "TensorScatter" not in report["ops"]["portable"]
    assert not {"rms_norm", "static_cache", "attention_mask"} & {each["name"] for each in report["passes"]}
    left = [each for each in report["unfused"] if each["op"] == "ReduceMean"]
    assert len(left) == 2 * LAYERS + 1


def test_idempotent(operated, tmp_path):
    report = operate(operated / "model.onnx", tmp_path, "--capacity", str(CAPACITY))
    assert report["ops"]["before"] == report["ops"]["portable"]
    first, second = (load_graph(folder / "model.onnx").graph for folder in (operated, tmp_path))
    nodes = [sorted((node.name, node.op_type) for node in graph.node) for graph in (first, second)]
    assert nodes[0] == nodes[1]
    assert list(first.input) == list(second.input)
    assert list(first.output) == list(second.output)


def test_up_to_date(exported, operated, capsys):
    arguments = [str(exported), "--out", str(operated), "--capacity", str(CAPACITY), "--no-verify"]
    written = (operated / "model.onnx").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "up to date" in capsys.readouterr().out
    assert (operated / "model.onnx").stat().st_mtime_ns == written
    assert main([*arguments, "--force"]) == 0
    assert (operated / "model.onnx").stat().st_mtime_ns > written


def test_other_options_run_again(exported, tmp_path, capsys):
    operate(exported, tmp_path, "--capacity", "16")
    operate(exported, tmp_path, "--capacity", "32")
    assert "up to date" not in capsys.readouterr().out
    assert find_signature(load_graph(tmp_path / "model.onnx")).capacity == 32


def test_not_onnx(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is not a graph")
    assert f"{path}: not an ONNX" in refusal(capsys, path, "--out", tmp_path / "out")
    assert "no such file" in refusal(capsys, tmp_path / "none.onnx", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_missing_and_truncated_weights(exported, tmp_path, capsys):
    path, weights = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    shutil.copy(exported, path)
    assert f"{weights}: no such file; put it back" in refusal(capsys, path, "--out", tmp_path / "out")
    data = (exported.parent / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    weights.write_bytes(data[: (header + len(data)) // 2])
    assert f"{weights}: truncated" in refusal(capsys, path, "--out", tmp_path / "out")


def test_wrong_arguments(exported, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    line = refusal(capsys, exported, *out, "--skip", "rms_nrom")
    assert "--skip rms_nrom: no such pass" in line
    assert "rms_norm" in line
    assert "--capacity" in refusal(capsys, exported, *out, "--capacity", "0")
    assert "--cache" in refusal(capsys, exported, *out, "--cache", "paged")
    assert "no cache inputs" in refusal(capsys, exported, *out, "--past", "nothing_like_it")


def test_wider_than_a_decoder(tmp_path):
    """A graph without a cache comes through, with nothing made of it that it is not."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["z"]), helper.make_node("Exp", ["z"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    report = operate(tmp_path / "model.onnx", tmp_path / "out")
    assert report["ops"]["portable"] == {"Neg": 1, "Exp": 1}
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    values = np.ones((2, 4), np.float32)
    assert np.allclose(session.run(None, {"x": values})[0], np.exp(-values))

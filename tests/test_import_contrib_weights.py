"""Weights of few bits in the forms that TensorRT builds: the same products, repacked as a stream beside the graph."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.core.manifest import read_manifest
from tests.contrib_cases import BATCH, FLOAT, FLOAT16, STEPS, Case, check, nbits, refused, run, standard

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("bits", "block", "outputs", "zero_points", "bias", "dtype"), [
    (4, 32, 24, "absent", False, FLOAT),
    (4, 16, 7, "absent", True, FLOAT16),
    (4, 32, 24, "middle", True, FLOAT),
    (4, 64, 24, "packed", False, FLOAT),
    (4, 32, 7, "packed", True, FLOAT16),
    (4, 16, 24, "float", True, FLOAT),
    (8, 32, 24, "absent", False, FLOAT),
    (8, 16, 24, "packed", True, FLOAT),
])  # fmt: skip
def test_matmul_of_few_bits(bits, block, outputs, zero_points, bias, dtype, tmp_path):
    case = Case()
    model = nbits(case, bits, block, 192, outputs, zero_points, bias, dtype)
    shifted = zero_points in ("packed", "float") or bits == 8  # negative scales
    found = check(case, model, tmp_path, dtype)
    assert found["MatMul"] == 1 + shifted
    assert found["DequantizeLinear"] == 1
    assert found["Add"] == shifted + bias
    converted, _ = standard(model, tmp_path)
    quantised = next(node for node in converted.graph.node if node.op_type == "DequantizeLinear")
    weights = {tensor.name: tensor for tensor in converted.graph.initializer}
    assert len(quantised.input) == 2
    assert weights[quantised.input[0]].data_type == {4: TensorProto.INT4, 8: TensorProto.INT8}[bits]
    scales = numpy_helper.to_array(weights[quantised.input[1]])
    assert bits == 4 or (scales >= 0).all()  # TensorRT's parser takes no negative ones beside int8


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("K", 190, "whole number of blocks"), ("bits", 2, "2 bits"), ("weight_prepacked", 1, "one kind of GPU"),
])  # fmt: skip
def test_what_a_matmul_of_few_bits_cannot_be(name, value, reason, tmp_path):
    model = nbits(Case(), 4, 32, 192, 8, "absent", False, FLOAT, weight_prepacked=0)
    next(each for each in model.graph.node[0].attribute if each.name == name).i = value
    assert reason in refused(model, tmp_path)


def test_reordered_features_are_refused(tmp_path):
    case = Case()
    model = nbits(case, 4, 32, 192, 8, "absent", False, FLOAT)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(192, dtype=np.int32), "g_idx"))
    model.graph.node[0].input.extend(["", "g_idx"])
    assert "g_idx" in refused(model, tmp_path)


@pytest.mark.slow
def test_repacked_weights_stream_to_a_file_beside_the_graph(tmp_path):
    """A weight above the limit goes to repacked.data, the source's folder stays as it is, the result runs."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    case = Case()
    model = nbits(case, 4, 32, 768, 512, "packed", True, FLOAT)
    expected = run(model, case.feeds)[0]
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    before = sorted(path.name for path in source.iterdir())
    command = [sys.executable, "-m", "suture.surgery", str(source / "model.onnx"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in source.iterdir()) == before
    assert (out / "repacked.data").stat().st_size >= 768 * 512 // 2
    assert read_manifest(out)["weights_root"] == "."
    assert not (out / "weights.data").exists()  # nothing that the graph no longer refers to
    assert (out / "model.onnx").stat().st_size < 768 * 512 // 2
    session = ort.SessionOptions()
    session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    found = ort.InferenceSession(str(out / "model.onnx"), session, providers=["CPUExecutionProvider"]).run(None, case.feeds)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "zero_points"), [(4, "absent"), (4, "other"), (8, "absent")])
@pytest.mark.parametrize("reshaped", [False, True])
def test_gather_of_few_bits(bits, zero_points, reshaped, tmp_path):
    case = Case()
    rows, features, block = 11, 64, 32
    packed = case.random.integers(0, 256, (rows, features * bits // 8), np.uint8)
    tokens = case.feed("input_ids", case.random.integers(0, rows, (BATCH, STEPS)))
    inputs = [case.weight("B", packed), tokens, case.weight("scales", case.normal(rows, features // block))]
    if zero_points == "other":
        inputs.append(case.weight("zero_points", case.random.integers(0, 256, (rows, features // block // 2), np.uint8)))
    attrs = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    model = case.model("GatherBlockQuantized", inputs, ["y"], **attrs)
    if reshaped:  # the head's weight, as onnxruntime-genai shares it
        model.graph.initializer[0].dims[:] = [rows, features // block, block * bits // 8]
        model.graph.initializer.append(numpy_helper.from_array(np.array(packed.shape), "shape"))
        model.graph.node.insert(0, helper.make_node("Reshape", ["B", "shape"], ["table"]))
        model.graph.node[1].input[0] = "table"
    assert check(case, model, tmp_path) == {"DequantizeLinear": 1, "Gather": 1}


@pytest.mark.parametrize("zero_points", ["eight", "other"])
def test_unsigned_weights_become_signed(zero_points, tmp_path):
    case = Case()
    x = case.x("x", BATCH, STEPS, 64)
    values, scales = case.random.integers(0, 16, (64, 24)), case.normal(2, 24)
    points = np.full((2, 24), 8) if zero_points == "eight" else case.random.integers(0, 16, (2, 24))
    model = case.model("MatMul", [x, "w"], ["y"], domain="")
    for name, array in (("B", values), ("zero_points", points)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.UINT4, array.shape, array.ravel().tolist()))
    model.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    quantised = helper.make_node("DequantizeLinear", ["B", "scales", "zero_points"], ["w"], axis=0, block_size=32)
    model.graph.node.insert(0, quantised)
    found = check(case, model, tmp_path)
    assert found["MatMul"] == (1 if zero_points == "eight" else 2)
    converted, _ = standard(model, tmp_path)
    assert TensorProto.UINT4 not in {tensor.data_type for tensor in converted.graph.initializer}


@pytest.mark.slow
def test_weights_from_elsewhere_join_the_repacked_ones(tmp_path):
    """All weights of a graph lie under one root: those of a checkpoint elsewhere are copied behind the new ones."""
    checkpoint, source, out = tmp_path / "checkpoint", tmp_path / "source", tmp_path / "out"
    for folder in (checkpoint, source):
        folder.mkdir()
    case = Case()
    model = nbits(case, 4, 32, 768, 512, "absent", True, FLOAT)
    expected = run(model, case.feeds)[0]
    onnx.save(model, checkpoint / "model.onnx", save_as_external_data=True, location="blobs", size_threshold=0)
    (checkpoint / "model.onnx").rename(source / "model.onnx")
    content = {"../checkpoint/blobs": {"sha256": hashlib.sha256((checkpoint / "blobs").read_bytes()).hexdigest()}}
    manifest = {"weights_root": "../checkpoint", "outputs": {"model.onnx": 0}, "content": content}
    (source / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "suture.surgery", str(source / "model.onnx"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert read_manifest(out)["weights_root"] == "."
    assert [path.name for path in checkpoint.iterdir()] == ["blobs"]
    found = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, case.feeds)[0]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()  # at its usual level it rounds x to 8 bits

"""Graphs and checkpoints too large to be loaded at once: the same numbers, a part of the weights at a time."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from decoder_graphs import decoder_graph

from suture.core import layerwise
from suture.core.layerwise import split, with_products_by_rows
from suture.core.network.parse import LARGE
from suture.core.parts import find_parts
from suture.core.weights import load_graph, references, tensor_bytes
from suture.models.named import checkpoint_folder
from suture.runtime.graphs import open_graph
from suture.runtime.network_decoder import open_network
from suture.surgery.__main__ import main
from suture.validate import reference
from suture.validate.compare import compare
from suture.validate.graph_part import compare_runs, in_onnxruntime, make_inputs
from suture.validate.levels import compare_graphs
from suture.validate.reference import open_reference
from suture.validate.scenarios import make_scenarios, random_tokens
from tests import families


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "MOST_WEIGHTS", 4_000)
    monkeypatch.setattr(reference, "LARGE", 0)


def written(static: bool, folder: Path, dtype: type = np.float32) -> Path:
    path = folder / f"{static}-{np.dtype(dtype).name}.onnx"
    graph = decoder_graph(static, dtype=dtype)
    onnx.save(graph, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=512)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.sample("False-float16", "True-bfloat16")
@pytest.mark.seconds
def test_parts_compute_what_the_whole_does(static, dtype, tmp_path, monkeypatch):
    path = written(static, tmp_path, dtype)
    whole = open_graph(path)
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "MOST_WEIGHTS", 4_000)
    monkeypatch.setattr(layerwise, "SLOTS", whole.capacity - 1 if static else 0)
    parts = open_graph(path)
    assert (whole.layerwise, parts.layerwise) == (False, True)
    assert parts.capacity == (whole.capacity - 1 if static else None)
    level = compare_graphs(whole, parts)
    assert level.status == "passed", level
    assert level.comparison.worst.error < (2e-3 if dtype is np.float16 else 1e-6)  # rounded where parts meet


def test_an_encoder_runs_by_parts(shared, monkeypatch):
    out = families.operated("whisper", "float32", shared)
    part = find_parts(out)[0]
    path = part.folder / "surgery" / "model.onnx"
    _, inputs = make_inputs(part.folder / "export" / "model.onnx", part, seed=0)
    whole = in_onnxruntime(path, "whole")
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "MOST_WEIGHTS", 20_000)
    assert len(split(load_graph(path))) > 4
    assert compare_runs(whole, in_onnxruntime(path, "parts"), inputs, 1e-6).status == "passed"


def test_each_part_has_few_weights_and_each_node_one_part(tmp_path, everything_is_large):
    model = load_graph(written(True, tmp_path))
    sizes = {tensor.name: tensor_bytes(tensor) for tensor, _ in references(model)}
    parts = split(model)
    assert len(parts) > 6
    assert sorted(id(node) for part in parts for node in part.nodes) == sorted(id(node) for node in model.graph.node)
    for part in parts:
        reads = [sum(sizes.get(name, 0) for name in node.input) for node in part.nodes if node.op_type != "Gather"]
        assert sum(reads) <= max(4_000, max(reads, default=0))


def test_the_network_of_a_large_graph_has_as_few_slots(tiny_export, tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "LARGE", 0)
    assert main([str(tiny_export / "model.onnx"), "--out", str(tmp_path), "--capacity", "256"]) == 0
    portable, network = open_graph(tmp_path / "model.onnx"), open_network(tmp_path / "model.trt.onnx")
    assert portable.capacity == network.capacity == layerwise.SLOTS
    assert max(constant.nbytes for constant in network.evaluate.constants.values()) < LARGE < network.vocab * 4 * 128
    scenarios = make_scenarios(random_tokens(portable.vocab, 0), portable.capacity, portable.trained_length, few_steps=True)
    comparison = compare(portable, network, scenarios)
    assert comparison.status == "passed"
    assert comparison.worst.error < 1e-4


def test_large_products_are_taken_by_rows(tiny_export, everything_is_large, monkeypatch):
    """The head of an export is a MatMul with a transposed weight; surgery makes it a Gemm."""
    monkeypatch.setattr(layerwise, "MOST_WEIGHTS", 200_000)
    model = load_graph(tiny_export / "model.onnx")
    by_rows = with_products_by_rows(model)
    (head,) = (node for node in by_rows.graph.node if "logits" in node.output)
    assert (head.op_type, len(head.input)) == ("Concat", 12)
    parts = open_graph(tiny_export / "model.onnx")
    monkeypatch.undo()
    scenarios = make_scenarios(random_tokens(parts.vocab, 0), None, parts.trained_length, few_steps=True)
    comparison = compare(open_graph(tiny_export / "model.onnx"), parts, scenarios)
    assert comparison.status == "passed"
    assert comparison.worst.error < 1e-5


def test_a_gemm_is_taken_by_rows(tmp_path, everything_is_large):
    weight = np.random.default_rng(0).standard_normal((5000, 4), np.float32)
    text = """<ir_version: 10, opset_import: ["": 24]> g (float[N, 4] x) => (float[N, 5000] y) { y = Gemm<transB = 1>(x, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "gemm.onnx", save_as_external_data=True, location="gemm.data")
    model = onnx.load(tmp_path / "gemm.onnx", load_external_data=False)
    by_rows = with_products_by_rows(model)
    assert [node.op_type for node in by_rows.graph.node] == 20 * ["Gemm"] + ["Concat"]
    onnx.save(by_rows, tmp_path / "rows.onnx")
    x = np.random.default_rng(1).standard_normal((3, 4), np.float32)
    (y,) = ort.InferenceSession(tmp_path / "rows.onnx").run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-qwen", "qwen2", "gpt2"])
@pytest.mark.sample("qwen2")
@pytest.mark.seconds
def test_a_checkpoint_read_as_it_goes_computes_the_same(name, monkeypatch, shared):
    """Embeddings that are the head, too, as of qwen2 and gpt2 here, are the one thing that stays."""
    folder = checkpoint_folder(name) if name == "tiny-qwen" else families.checkpoint(name, shared)
    whole = open_reference(folder, onnx.TensorProto.BFLOAT16)
    monkeypatch.setattr(reference, "LARGE", 0)
    pieces = open_reference(folder, onnx.TensorProto.BFLOAT16)
    tokens, counts, alpha = np.arange(18).reshape(2, 9), np.array([9, 4]), np.ones(2, np.float32)
    ours, theirs = (model.decoder(2).step(tokens, counts, alpha) for model in (whole, pieces))
    np.testing.assert_array_equal(ours, theirs)
    kept = [parameter for parameter in pieces.module.parameters() if parameter.device != torch.device("meta")]
    assert len(kept) == (name != "tiny-qwen")

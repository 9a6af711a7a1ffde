"""The lowered graph: TensorRT's forms of attention, and rewrites for its kernels that onnxruntime can check one by one."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import decoder_graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from suture.surgery.graph import consumers, files, onnx_type, producer
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes.lowering import joint_rotary, split_products
from suture.surgery.passes.portable import packed_heads, query_scale
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from suture.surgery.verification import verify
from tests.decoding import decode, largest_error

ROOT = Path(__file__).parents[1]
LAYERS = 4


@pytest.fixture(scope="module")
def operated(tiny_export, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("surgery")
    command = [sys.executable, "-m", "suture.surgery", tiny_export / "model.onnx", "--out", out, "--capacity", "64"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def ops(graph) -> Counter:
    return Counter(node.op for node in graph.gs.nodes)


def test_attention_has_one_shared_mask_and_scales_the_query_alone(operated):
    graph = files.read(operated / "model.trt.onnx")
    attentions = graph.nodes("TRT_Attention")
    assert len(attentions) == LAYERS
    assert not graph.nodes("Attention")
    masks = {id(node.inputs[3]) for node in attentions}
    assert len(masks) == 1
    for node in attentions:
        query, keys, values, mask = node.inputs
        assert producer(query, "Mul") is not None
        assert producer(keys, "TensorScatter") is not None
        assert producer(values, "TensorScatter") is not None
        assert producer(mask, "Where") is not None
        assert node.attrs == {"TRT_decomposable": 1}  # float32
    assert {tensor.name for tensor in graph.gs.inputs} >= {"write_indices", "ntk_alpha"}


def test_query_and_key_are_rotated_together(operated):
    """What the query's tables were scaled by goes back to the query."""
    portable = onnx.load(operated / "model.onnx", load_external_data=False)
    graph = files.read(operated / "model.onnx")
    assert ops(graph)["RotaryEmbedding"] == 2 * LAYERS
    assert joint_rotary.run(graph) == LAYERS
    graph.gs.cleanup()
    assert ops(graph)["RotaryEmbedding"] == LAYERS
    assert sum(producer(node.inputs[0], "Mul") is not None for node in graph.nodes("Attention")) == LAYERS
    expected, got = (decode(model, alone=False, root=operated) for model in (portable, files.to_model(graph)))
    assert largest_error(expected, got) <= 1e-4
    assert joint_rotary.run(files.reread(graph)) == 0


def test_queries_with_tables_of_another_kind_are_not_joined(operated):
    graph = files.read(operated / "model.onnx")
    for node in graph.nodes("RotaryEmbedding")[::2]:
        node.inputs[1] = graph.new("Neg", [node.inputs[1]], shape=node.inputs[1].shape)
    assert joint_rotary.run(graph) == 0
    assert len(graph.near_misses) == LAYERS
    assert all("different tables" in miss.reason for miss in graph.near_misses)


def test_the_portable_graph_scales_no_query(operated):
    """Log-n scaling lies in the query's own tables, made once for all layers; heads are transposed once a layer."""
    graph = files.read(operated / "model.onnx")
    rotations = graph.nodes("RotaryEmbedding")
    assert len({id(node.inputs[1]) for node in rotations}) == 2
    assert not any(consumers(node.outputs[0], "Mul") for node in rotations)
    assert ops(graph)["Transpose"] == 2 * LAYERS  # heads first, and back after attention
    assert query_scale.run(graph) == packed_heads.run(graph) == 0


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_of_few_heads_may_be_taken_apart(heads, tmp_path, monkeypatch):
    """For one token TensorRT has fused kernels of four query heads or more; with fewer it builds no engine, unless marked."""
    monkeypatch.setattr(decoder_graphs, "HEADS", heads)
    monkeypatch.setattr(decoder_graphs, "KV_HEADS", 2)
    monkeypatch.setattr(decoder_graphs, "HEAD_DIM", 16)
    monkeypatch.setattr(decoder_graphs, "HIDDEN", heads * 16)
    onnx.save(decoder_graphs.decoder_graph(static=False, dtype=np.float16), tmp_path / "model.onnx")
    plan = make_plan(SurgeryOptions(capacity=32))
    _, lowered, report = run_plan(files.read(tmp_path / "model.onnx"), plan)
    marked = [bool(node.attrs.get("TRT_decomposable")) for node in lowered.nodes("TRT_Attention")]
    assert marked == [heads < 4] * 2
    assert [f"{heads} query heads" in note for note in report.notes] == [True] * (2 if heads < 4 else 0)
    if heads < 4:
        files.write(lowered, tmp_path / "model.trt.onnx")
        command = [sys.executable, "-m", "suture.build", tmp_path / "model.trt.onnx", "--out", tmp_path / "build"]
        built = subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        for node in lowered.nodes("TRT_Attention"):
            node.attrs.clear()
        files.write(lowered, tmp_path / "model.trt.onnx")
        command[-1] = tmp_path / "unmarked"
        built = subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert built.returncode == 2, "TensorRT has a kernel for two heads now: take the mark out"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_boolean_mask_becomes_an_additive_one(dtype, tmp_path):
    """That of a growing cache, which all layers share: TensorRT builds none that is boolean and shared for short sequences."""
    onnx.save(decoder_graphs.decoder_graph(static=False, dtype=dtype), tmp_path / "model.onnx")
    portable, lowered, _ = run_plan(
        files.read(tmp_path / "model.onnx"), make_plan(SurgeryOptions(cache="growing", capacity=32))
    )
    attentions = lowered.nodes("TRT_Attention")
    assert len(attentions) == 2
    assert len({id(node.inputs[3]) for node in attentions}) == 1
    assert {onnx_type(node.inputs[3]) for node in attentions} == {onnx_type(attentions[0].inputs[0])}
    before, after = (verify.State.of(graph) for graph in (portable, lowered))
    verify.compare("lowered", before, before, after)


def test_parts_of_a_product_are_cut_along_an_axis_of_their_own(tmp_path):
    """The cut of a product's last axis alone, and only where what is left has a common width."""
    text = """<ir_version: 11, opset_import: ["": 24]> cut (float[tokens, 8] x, int64[2] rows) => (float[tokens, 16] a,
        float[tokens, 8] b, float[tokens, 12] c, float[tokens, 11] d, float[r, 23] e, float[tokens, 6] f, float[tokens, 2] g)
        <float[8, 24] w, float[8, 23] v, int64[2] two = {16, 8}, int64[2] odd = {12, 11}, int64[2] few = {6, 2}> {
        y = MatMul(x, w)  a, b = Split<axis = -1>(y, two)  z = MatMul(x, v)  c, d = Split<axis = 1>(z, odd)
        n = MatMul(x, v)  e, rest = Split<axis = 0>(n, rows)  f, g = Split<axis = 1>(x, few) }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, width in (("w", 24), ("v", 23)):
        values = random.standard_normal((8, width), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    graph = files.read(tmp_path / "model.onnx")
    assert split_products.run(graph) == 1
    assert [miss.reason for miss in graph.near_misses] == ["the parts' widths have no common divisor"]
    assert next(list(node.outputs[0].shape) for node in graph.nodes("Split") if node.attrs["axis"] == 1)[1:] == [2, 8]
    feeds = {"x": random.standard_normal((3, 8), np.float32), "rows": np.array([1, 2])}
    before, after = (ort.InferenceSession(each.SerializeToString()).run(None, feeds) for each in (model, files.to_model(graph)))
    for expected, got in zip(before, after, strict=True):
        np.testing.assert_array_equal(expected, got)
    assert split_products.run(files.reread(graph)) == 0

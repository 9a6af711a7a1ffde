"""The lowered graph: TensorRT's forms of attention, and rewrites for its kernels that onnxruntime can check one by one."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest

from surgery import files
from surgery.graph import consumers, producer
from surgery.lowering import joint_rotary, query_scale
from tests.decoding import decode, largest_error

ROOT = Path(__file__).parents[1]
LAYERS = 4


@pytest.fixture(scope="module")
def operated(tiny_export, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("surgery")
    command = [sys.executable, "-m", "surgery", tiny_export / "model.onnx", "--out", out, "--capacity", "64"]
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


@pytest.mark.parametrize(
    ("a_pass", "rotations"), [(joint_rotary, LAYERS), (query_scale, 2 * LAYERS)], ids=["joint_rotary", "query_scale"]
)
def test_rewrites_change_nothing(operated, a_pass, rotations):
    portable = onnx.load(operated / "model.onnx", load_external_data=False)
    graph = files.read(operated / "model.onnx")
    before = ops(graph)
    assert before["RotaryEmbedding"] == 2 * LAYERS
    assert a_pass.run(graph) == LAYERS
    graph.gs.cleanup()
    assert ops(graph)["RotaryEmbedding"] == rotations
    if a_pass is joint_rotary:
        assert ops(graph)["Transpose"] == before["Transpose"] - 2 * LAYERS
    else:
        assert all(not consumers(node.outputs[0], "Mul") for node in graph.nodes("RotaryEmbedding"))
    expected, got = (decode(model, alone=False, root=operated) for model in (portable, files.to_model(graph)))
    assert largest_error(expected, got) <= 1e-4
    again = files.reread(graph)
    assert a_pass.run(again) == 0


def test_queries_and_keys_with_tables_of_their_own_are_not_joined(operated):
    graph = files.read(operated / "model.onnx")
    query_scale.run(graph)
    graph.gs.cleanup()
    graph = files.reread(graph)
    assert joint_rotary.run(graph) == 0
    assert len(graph.near_misses) == LAYERS
    assert all("different tables" in miss.reason for miss in graph.near_misses)

"""Whole graphs of onnxruntime-genai's builder through surgery: what comes out, and that it computes the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper, numpy_helper

from suture.core.head_sizes import write_head_sizes
from suture.core.weights import load_graph, weights_root
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from suture.surgery.shapes.foreign_shapes import declare_shapes
from tests import decoding
from tests.contrib_cases import DIM, FLOAT, HEADS, Case, grouped, ops
from tests.graphs import weightless

ROOT = Path(__file__).parents[1]
DIALECTS = ROOT.parent / "shared" / "dialects"

llama = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
GENAI = {
    "llama-int4-asymmetric": llama | {"DequantizeLinear": 11},
    "llama-int4-tied": llama | {"DequantizeLinear": 12},
    "phi-float32": {"Attention": 2, "LayerNormalization": 3, "RotaryEmbedding": 4, "Gelu": 2, "TensorScatter": 4},
    "qwen3-float16": llama | {"RMSNormalization": 9},  # MultiHeadAttention over repeated keys and values
}
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter",
         "DequantizeLinear")  # fmt: skip


def at_full_accuracy(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":  # 4 lets onnxruntime round x to 8 bits
                attribute.i = 1
    return model


def whole(source: onnx.ModelProto, folder: Path, cache: str) -> tuple[onnx.ModelProto, list]:
    onnx.save(source, folder / "source.onnx")
    portable, _, report = run_plan(files.read(folder / "source.onnx"), make_plan(SurgeryOptions(cache=cache, capacity=32)))
    return files.to_model(portable), report.unfused


@pytest.mark.parametrize("name", GENAI)
def test_graphs_of_the_builder(name, tmp_path, monkeypatch):
    if name == "qwen3-float16":  # its mask takes a prompt or one token
        monkeypatch.setattr(decoding, "SCHEDULE", ([7, 3, 5], [1, 1, 1], [1, 0, 1], [1, 1, 1]))
    source = at_full_accuracy(weightless.load(f"genai/{name}"))
    portable, unfused = whole(source, tmp_path, "static")
    found = ops(portable)
    assert {op: found[op] for op in FUSED if found[op]} == GENAI[name]
    assert unfused == []
    onnx.checker.check_model(portable, full_check=True)
    reference = decoding.decode(source, alone=True)
    tolerance = 2e-2 if name.endswith("float16") else 1e-4
    assert decoding.largest_error(reference, decoding.decode(portable, alone=False)) < tolerance
    growing, _ = whole(source, tmp_path, "growing")
    assert ops(growing)["TensorScatter"] == 0
    assert decoding.largest_error(reference, decoding.decode(growing, alone=True)) < tolerance


def test_a_disturbed_zero_point_shows(tmp_path):
    """The comparison above sees one block of one weight."""
    source = at_full_accuracy(weightless.load("genai/llama-int4-asymmetric"))
    portable, _ = whole(source, tmp_path, "static")
    shift = next(tensor for tensor in portable.graph.initializer if tensor.name.endswith("_shift"))
    values = numpy_helper.to_array(shift).copy()
    values[1] += 0.05
    shift.CopyFrom(numpy_helper.from_array(values, shift.name))
    assert decoding.largest_error(decoding.decode(source, alone=True), decoding.decode(portable, alone=False)) > 1e-4


@pytest.mark.skipif(not DIALECTS.is_dir(), reason="needs ../shared/dialects")
@pytest.mark.parametrize(("name", "expected", "tolerance"), [
    ("ort_genai018_qwen2_fp16_cuda", llama, 2e-2),
    ("ort_genai018_qwen2_int4_cpu", llama | {"DequantizeLinear": 11}, 1e-4),
])  # fmt: skip
@pytest.mark.sample("*int4*")
def test_shared_dialects(name, expected, tolerance, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(DIALECTS / name, source)  # surgery links weights, and links of theirs would make onnx refuse them
    model = at_full_accuracy(load_graph(source / "model.onnx"))
    command = [sys.executable, "-m", "suture.surgery", str(source / "model.onnx"), "--out", str(out), "--capacity", "32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    portable = load_graph(out / "model.onnx")
    counts = ops(portable)
    assert {op: counts[op] for op in FUSED if counts[op]} == expected
    assert all(not node.domain for node in portable.graph.node)
    reference = decoding.decode(model, alone=True, root=source)
    found = decoding.decode(portable, alone=False, root=weights_root(out / "model.onnx"))
    assert decoding.largest_error(reference, found) < tolerance
    command = [sys.executable, "-m", "suture.build", str(out / "model.trt.onnx"), "--out", str(tmp_path / "engine")]
    assert subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_shapes_reach_through_ops_that_onnx_does_not_know():
    bare = weightless.load("genai/llama-int4-asymmetric")
    del bare.graph.value_info[:]
    declare_shapes(bare)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in bare.graph.value_info}
    attention = [node for node in bare.graph.node if node.op_type == "GroupQueryAttention"]
    assert [shapes[node.input[0]][2].dim_value for node in attention] == [256, 256]
    assert [shapes[node.output[0]][2].dim_value for node in attention] == [128, 128]


def test_a_head_size_left_open_is_written_where_the_graph_tells_it():
    model = grouped(Case(), packed=True)
    model.graph.value_info.append(helper.make_tensor_value_info("logits", FLOAT, ["batch", "sequence", HEADS * DIM]))
    del model.graph.output[0]
    write_head_sizes(model)
    values = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)}
    assert [values[name][3].dim_value for name in ("past_key", "past_value", "present_key", "present_value")] == [DIM] * 4

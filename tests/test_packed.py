"""Checkpoints of AutoAWQ and GPTQ, of Qwen's shape and of LLaMA's: exact to the weights they stand for, from export to
TensorRT's network."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from packed_checkpoints import write_packed_checkpoint
from safetensors.torch import load_file, save_file

from suture.core.errors import UserError
from suture.core.network.compare import compare as compare_network
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import parse
from suture.core.weights import load_graph
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models.architectures import load_model, meta_model, open_checkpoint
from suture.models.named import checkpoint_folder
from suture.runtime.graphs import open_graph
from suture.surgery.__main__ import main
from suture.validate.compare import compare
from suture.validate.reference import open_reference
from suture.validate.scenarios import make_scenarios, random_tokens
from tests.families import checkpoint as family_checkpoint

KINDS = {
    "awq": dict(method="awq"),
    "awq, 16": dict(method="awq", group_size=16),
    "awq, whole": dict(method="awq", group_size=-1),
    "gptq": dict(method="gptq"),
    "gptq-act-order": dict(method="gptq", act_order=True),
    "gptq-act-order-symmetric, 16": dict(method="gptq", act_order=True, symmetric=True, group_size=16),
    "gptq-v2-symmetric": dict(method="gptq", symmetric=True, version="gptq_v2"),
    "gptq-symmetric, whole": dict(method="gptq", symmetric=True, group_size=-1),
    "gptq-8-bits": dict(method="gptq", bits=8, symmetric=True),
}
PRODUCTS = {"tiny-qwen": 5, "llama": 7, "qwen2": 7}  # qwen2's have biases


@pytest.fixture(scope="module")
def source(shared):
    """The folder of a small checkpoint in floats, by name."""
    return lambda name: checkpoint_folder(name) if name == "tiny-qwen" else family_checkpoint(name, shared)


def export_float32(checkpoint: Path, out: Path) -> Path:
    export(out, ExportOptions(checkpoint=checkpoint, dtype="float32"))
    return out / "model.onnx"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", PRODUCTS)
def test_unpacking_is_exact(model, kind, source, tmp_path):
    exact = write_packed_checkpoint(source(model), tmp_path / "checkpoint", **KINDS[kind])
    loaded = load_model(open_checkpoint(tmp_path / "checkpoint"), torch.float32).state_dict()
    assert len(exact) == PRODUCTS[model]
    for name, weight in exact.items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param("tiny-qwen", "awq", marks=pytest.mark.slow),
        pytest.param("tiny-qwen", "gptq-8-bits", marks=pytest.mark.slow),
        pytest.param("tiny-qwen", "awq, whole", marks=pytest.mark.slow),
        ("llama", "awq, 16"),
        pytest.param("llama", "gptq-act-order", marks=pytest.mark.slow),
        ("qwen2", "gptq-act-order"),
    ],
)
@pytest.mark.sample("qwen2*")
def test_from_checkpoint_to_network(model, kind, source, tmp_path):
    """The exported graph's own bytes dequantise to the checkpoint's weights, bit by bit; and every later graph computes
    with them, zeros off the middle and inputs out of order included."""
    exact = write_packed_checkpoint(source(model), tmp_path / "checkpoint", **KINDS[kind])
    exported = export_float32(tmp_path / "checkpoint", tmp_path / "export")
    proto = onnx.load(exported)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == PRODUCTS[model]
    for node in nodes:
        q, scales, *zeros = (tensors[name].astype(np.float32) for name in node.input)
        zeros = zeros[0] if zeros else np.zeros_like(scales)
        assert len(q) // len(scales) <= 256  # as many as kernels take
        scales, zeros = (np.atleast_2d(each).repeat(len(q) // len(np.atleast_2d(each)), axis=0) for each in (scales, zeros))
        dequantised = (q - zeros) * scales
        name = node.input[0].removesuffix("_q")
        order = tensors.get(f"{name}_order", np.arange(len(q)))
        assert np.array_equal(dequantised, exact[name].numpy().T[order]), name
    assert (f"{name}_order" in tensors) == ("act-order" in kind)

    assert main([str(exported), "--out", str(tmp_path / "surgery"), "--capacity", "64"]) == 0
    portable = open_graph(tmp_path / "surgery" / "model.onnx")
    scenarios = make_scenarios(random_tokens(portable.vocab, 0), 64, None)[:3]
    assert compare(open_reference(tmp_path / "checkpoint"), portable, scenarios).status == "passed"
    written = onnx.load(tmp_path / "surgery" / "model.trt.onnx", load_external_data=False)
    assert TensorProto.UINT4 not in {tensor.data_type for tensor in written.graph.initializer}
    assert {len(node.input) for node in written.graph.node if node.op_type == "DequantizeLinear"} == {2}
    feeds = make_feeds(load_graph(tmp_path / "surgery" / "model.onnx"))[1:]
    network = Evaluator(parse(tmp_path / "surgery" / "model.trt.onnx"))
    outcomes = compare_network(network, tmp_path / "surgery" / "model.onnx", feeds, 1e-5)
    assert not [output for outcome in outcomes for output in outcome.outputs if output.beyond(1e-5)]


def test_a_bias_of_zeros_is_left_out_and_no_other(source, tmp_path):
    """AutoGPTQ writes a bias of zeros beside the weights of a LLaMA."""
    folder = tmp_path / "checkpoint"
    write_packed_checkpoint(source("llama"), folder, "gptq")
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    meta_model(open_checkpoint(folder))
    tensors[bias][3] = 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="q_proj\\.bias is not zero"):
        meta_model(open_checkpoint(folder))


def test_what_cannot_be_read_is_refused(source, tmp_path):
    folder = tmp_path / "checkpoint"
    write_packed_checkpoint(source("tiny-qwen"), folder, "awq")
    config = json.loads((folder / "config.json").read_text())

    def refusal(**changed: object) -> str:
        quantization = config["quantization_config"] | changed if changed else None
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(UserError) as refused:
            meta_model(open_checkpoint(folder))
        return str(refused.value)

    assert "weights of 4 bits packed by awq (gemv) are not supported" in refusal(version="gemv")
    assert "weights of 3 bits packed by gptq" in refusal(quant_method="gptq", bits=3)
    assert "packed by marlin" in refusal(quant_method="marlin")
    assert "config.json has no quantization_config" in refusal()

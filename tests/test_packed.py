"""Checkpoints of AutoAWQ and GPTQ: exact to the weights they stand for, from export to TensorRT's network."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from packed_checkpoints import GROUP, write_packed_checkpoint

from contracts.errors import UserError
from contracts.weights import load_graph
from export.__main__ import export
from models import load_model, meta_model, open_checkpoint
from runtime.graphs import open_graph
from surgery.__main__ import main
from validate.compare import compare
from validate.network.compare import compare as compare_network
from validate.network.evaluate import Evaluator
from validate.network.inputs import make_feeds
from validate.network.parse import parse
from validate.reference import open_reference
from validate.scenarios import make_scenarios, random_tokens

KINDS = {
    "awq": dict(method="awq"),
    "gptq": dict(method="gptq"),
    "gptq-act-order": dict(method="gptq", act_order=True),
    "gptq-v2-symmetric": dict(method="gptq", symmetric=True, version="gptq_v2"),
    "gptq-8-bits": dict(method="gptq", bits=8, symmetric=True),
}
PRODUCTS = 5


def export_float32(checkpoint: Path, out: Path) -> Path:
    export(Namespace(checkpoint=checkpoint, model=None, dtype="float32", weights=None, out=out, force=False))
    return out / "model.onnx"


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_is_exact(kind, tmp_path):
    exact = write_packed_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    loaded = load_model(open_checkpoint(tmp_path / "checkpoint"), torch.float32).state_dict()
    assert len(exact) == PRODUCTS
    for name, weight in exact.items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize("kind", ["awq", "gptq-act-order", "gptq-8-bits"])
def test_from_checkpoint_to_network(kind, tmp_path):
    """The exported graph's own bytes dequantise to the checkpoint's weights, bit by bit; and every later graph computes
    with them, zeros off the middle and inputs out of order included."""
    exact = write_packed_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    exported = export_float32(tmp_path / "checkpoint", tmp_path / "export")
    proto = onnx.load(exported)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == PRODUCTS
    for node in nodes:
        q, scales, *zeros = (tensors[name].astype(np.float32) for name in node.input)
        zeros = zeros[0] if zeros else np.zeros_like(scales)
        dequantised = (q - zeros.repeat(GROUP, axis=0)) * scales.repeat(GROUP, axis=0)
        name = node.input[0].removesuffix("_q")
        order = tensors.get(f"{name}_order", np.arange(len(q)))
        assert np.array_equal(dequantised, exact[name].numpy().T[order]), name
    assert (f"{name}_order" in tensors) == (kind == "gptq-act-order")

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


def test_what_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    write_packed_checkpoint(folder, "awq")
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

"""Scales of int4 weights that are not above zero, such as onnxruntime's quantiser writes, are warned of."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer, QuantFormat
from test_build import run_build

from suture.core.network.graph_audit import audit_graph


@pytest.fixture
def product() -> onnx.ModelProto:
    """x @ W1 @ W2, float32 [64, 64] each."""
    random = np.random.default_rng(0)
    weights = [numpy_helper.from_array(random.standard_normal((64, 64), np.float32), f"W{i}") for i in (1, 2)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 64]) for name in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "W1"], ["h"], "one"), helper.make_node("MatMul", ["h", "W2"], ["y"], "two")]
    graph = helper.make_graph(nodes, "product", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def quantised(model: onnx.ModelProto, symmetric: bool) -> onnx.ModelProto:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, quant_format=QuantFormat.QDQ)
    quantiser = MatMulNBitsQuantizer(model, algo_config=config)
    quantiser.process()
    return quantiser.model.model


def test_onnxruntimes_scales_below_zero_are_a_warning(product, tmp_path):
    model = quantised(product, symmetric=True)
    scales = [node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(scales) == 2
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    done = run_build(tmp_path / "model.onnx", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = f"scales {scales[0]} and 1 more"
    (line,) = [line for line in done.stdout.splitlines() if "scales" in line]
    assert line.startswith(f"build: warning: {said}: some are not above zero, which TensorRT's reference asks of them")
    assert said in {finding["where"] for finding in json.loads((tmp_path / "out" / "engine.json").read_text())["findings"]}


def test_scales_above_zero_are_no_finding(product):
    model = quantised(product, symmetric=True)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(tensor)), tensor.name))
    assert audit_graph(model, Path()) == []
    assert audit_graph(product, Path()) == []

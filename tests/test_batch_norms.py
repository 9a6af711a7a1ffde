"""BatchNormalization of 16 bits: TensorRT rounds what it makes of the parameters, which is no other meaning; another epsilon is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import suture
from suture.core.network.batch_norms import unrounded
from suture.core.network.dtypes import Constants
from suture.core.network.parse import parse


def graph(dtype: int, epsilon: float = 1e-5) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    bounds = {"scale": (0.8, 1.2), "bias": (-0.1, 0.1), "mean": (-0.1, 0.1), "variance": (0.8, 1.2)}
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [numpy_helper.from_array(random.uniform(*each, 8).astype(numbers), name) for name, each in bounds.items()]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("BatchNormalization", ["a", *bounds], ["y"], epsilon=epsilon),
    ]
    ends = [helper.make_tensor_value_info(name, dtype, [1, 8, 6, 6]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_it_is_proven(dtype):
    proof = suture.operate(graph(dtype)).report.proof
    assert [pair["status"] for pair in proof["pairs"]] == ["passed", "passed"]
    assert all(pair["comparisons"][0]["tolerance"] == 1e-5 for pair in proof["pairs"])


def test_what_the_layer_holds_stays_where_it_is_something_else(tmp_path):
    """Planted: the network of another epsilon, and of a bias that is off by its own size."""
    path = tmp_path / "model.onnx"
    onnx.save(graph(TensorProto.FLOAT16), path)
    network = parse(path)
    (held,) = [layer for layer in network.layers if layer.type == "SCALE"]

    def taken(model: onnx.ModelProto):
        (layer,) = [each for each in unrounded(network, model, Constants(path, model)).layers if each.type == "SCALE"]
        return layer.attributes

    assert taken(graph(TensorProto.FLOAT16))["scale"].dtype == np.float32
    assert taken(graph(TensorProto.FLOAT16, epsilon=0.1))["scale"] is held.attributes["scale"]
    other = graph(TensorProto.FLOAT16)
    bias = numpy_helper.to_array(other.graph.initializer[1])
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(2 * bias, "bias"))
    assert taken(other)["shift"] is held.attributes["shift"]

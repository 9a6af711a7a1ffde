"""What half precision must not lose: masks of -inf, and the statistics of norms."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests import decoding
from tests.graphs import weightless
from tests.graphs.retype import retyped
from tests.test_network_families import WITHIN, network_error, write

HALF_MOST = 65504.0


def replace(model: onnx.ModelProto, tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def constants(model: onnx.ModelProto):
    """Initializers and the tensors of Constant nodes, of floats."""
    yield from (tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16)
    attributes = (attribute for node in model.graph.node for attribute in node.attribute)
    yield from (attribute.t for attribute in attributes if attribute.t.data_type == TensorProto.FLOAT16)


def test_masks_of_minus_infinity_in_float16(tmp_path):
    """0 · -inf and -inf - -inf are not numbers: neither graph keeps such a constant, and both compute the same."""
    source = retyped(weightless.load("torch213_torchscript_qwen2_op17_float32"), TensorProto.FLOAT16)
    hiding = [tensor for tensor in constants(source) if numpy_helper.to_array(tensor).min(initial=0) <= -5e4]
    assert hiding
    for tensor in hiding:
        values = numpy_helper.to_array(tensor)
        replace(source, tensor, np.where(values <= -5e4, -np.inf, values).astype(np.float16))
    portable, lowered = write(source, tmp_path)
    for path in (portable, lowered):
        written = onnx.load(path)
        assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in constants(written))
    error = network_error(portable, lowered)
    assert error is not None
    assert error < WITHIN["float16"]
    assert decoding.largest_error(decoding.decode(source, alone=True), decoding.decode(onnx.load(portable), alone=False)) < 1e-2


@pytest.mark.parametrize("name", ["llama-dynamo-24-float16", "gptneox-dynamo-23-float16"], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.sample(1)
def test_statistics_of_norms_in_float32(name, tmp_path):
    """Activations whose squares float16 cannot hold, as trained models have them: in onnxruntime, and in what TensorRT's
    parser makes of the lowered graph."""
    source = weightless.load(name)
    rows = {node.input[0] for node in source.graph.node if node.op_type == "Gather"}
    (embedding,) = (tensor for tensor in source.graph.initializer if tensor.name in rows and len(tensor.dims) == 2)
    values = numpy_helper.to_array(embedding).astype(np.float32)
    large = values * 2000 / np.abs(values).max()
    assert np.square(large).mean(axis=1).min() > HALF_MOST
    replace(source, embedding, large.astype(np.float16))
    portable, lowered = write(source, tmp_path)
    error = network_error(portable, lowered)
    assert error is not None
    assert error < WITHIN["float16"]
    assert decoding.largest_error(decoding.decode(source, alone=True), decoding.decode(onnx.load(portable), alone=False)) < 1e-2

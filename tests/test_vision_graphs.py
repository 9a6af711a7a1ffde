"""Graphs of models of pictures from both of torch's exporters: what is fused, and that source, portable graph and network agree."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import describe
from suture.core.network.runner import to_numpy
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.graphs import weightless

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCES = {np.float32: 2e-6, np.float16: 4e-3}
FUSED = {  # portable; what is not there is left as the exporter wrote it
    "detr-dynamo-18-float32": {"Attention": 4, "LayerNormalization": 8, "Softmax": 0},
    "detr-torchscript-17-float32": {"Attention": 5, "LayerNormalization": 9, "Softmax": 0},
    "flux-dynamo-18-float16": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 6, "Softmax": 0, "Neg": 0},
    "group_norm_float32-dynamo-18-float16": {"LayerNormalization": 1, "Swish": 1, "InstanceNormalization": 0},
    "group_norm_float32-torchscript-17-float16": {"LayerNormalization": 1, "Swish": 1, "InstanceNormalization": 0},
    "packed_rotary-dynamo-18-float32": {"Attention": 1, "RotaryEmbedding": 2, "Softmax": 0, "Neg": 0},
    "packed_rotary-torchscript-17-float32": {"Attention": 1, "RotaryEmbedding": 2, "Softmax": 0, "Neg": 0},
    "siglip_head-dynamo-18-float32": {"Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Softmax": 0},
    "siglip_head-torchscript-17-float16": {"Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Softmax": 0},
}


@pytest.mark.parametrize("name", FUSED)
def test_a_graph_is_fused_and_means_the_same(name, tmp_path):
    source = weightless.load(f"vision/{name}")
    portable, lowered = operated(source, tmp_path)
    found = Counter(node.op_type for node in portable.graph.node)
    assert {op: found[op] for op in FUSED[name]} == FUSED[name]
    feeds = made_up(source)
    expected = run(source, feeds)
    kind = max((each.dtype.type for each in feeds.values()), key=lambda kind: TOLERANCES[kind])
    assert error(expected, run(portable, feeds)) < TOLERANCES[kind]
    onnx.save(lowered, target := tmp_path / "lowered.onnx")
    network = Evaluator(describe(target.read_bytes(), target, tmp_path), "cpu")(feeds)
    assert error(expected, [to_numpy(network[value.name]) for value in source.graph.output]) < TOLERANCES[kind]


@pytest.mark.parametrize("exporter", ["dynamo-18", "torchscript-17"])
def test_no_cast_stands_around_a_lowered_group_normalisation(exporter, tmp_path):
    _, lowered = operated(weightless.load(f"vision/group_norm_float32-{exporter}-float16"), tmp_path)
    (norm,) = [node for node in lowered.graph.node if node.op_type == "GroupNormalization"]
    made = {node.output[0]: node.op_type for node in lowered.graph.node}
    assert made[norm.input[0]] == "Conv"
    assert [node.op_type for node in lowered.graph.node if norm.output[0] in node.input] == ["Swish"]


def test_parameters_that_half_precision_has_not_keep_a_group_normalisation_in_float32(tmp_path):
    source = weightless.load("vision/group_norm_float32-dynamo-18-float16")
    changed = 0
    for tensor in source.graph.initializer:
        if list(tensor.dims) == [32, 1, 1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full([32, 1, 1], 1.0001, np.float32), tensor.name))
            changed += 1
    assert changed
    _, lowered = operated(source, tmp_path)
    (norm,) = [node for node in lowered.graph.node if node.op_type == "GroupNormalization"]
    made = {node.output[0]: node.op_type for node in lowered.graph.node}
    assert made[norm.input[0]] == "Cast"


def operated(source: onnx.ModelProto, folder) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    onnx.save(source, folder / "source.onnx")
    portable, lowered, _ = run_plan(files.read(folder / "source.onnx"), make_plan(SurgeryOptions()))
    return files.without_shapes(files.to_model(portable)), files.without_shapes(files.to_model(lowered))


def made_up(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    kinds = {value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    return {name: random.standard_normal(shape).astype(kinds[name]) for name, shape in sizes.items()}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def error(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest, of what the output's largest number is."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(expected, found, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def test_constants_in_bfloat16_are_folded_where_onnxruntime_has_no_kernel(tmp_path):
    """A product of two, as a picture's embedded positions are of its grid and a table."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (bfloat16[2, 3] x) => (bfloat16[2, 3] y) { c = MatMul(a, b)  y = Add(x, c) }'
    )
    values = {"a": np.full([2, 2], 0.5, np.float32), "b": np.array([[1, 2, 3], [4, 5, 6]], np.float32)}
    kind = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value.astype(kind), name) for name, value in values.items())
    portable, _ = operated(model, tmp_path)
    assert [node.op_type for node in portable.graph.node] == ["Add"]
    (folded,) = portable.graph.initializer
    assert folded.data_type == onnx.TensorProto.BFLOAT16
    assert np.array_equal(onnx.numpy_helper.to_array(folded).astype(np.float32), values["a"] @ values["b"])

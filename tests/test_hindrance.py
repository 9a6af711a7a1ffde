"""Surgery does not hinder TensorRT: kernels and bytes of engines before and after, and the forms that keep it so."""

import numpy as np
import onnx
import pytest

from benchmarks.hindrance import EngineCost, EnginePair, compare
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import describe
from suture.core.network.runner import to_numpy
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes.lowering import pointwise_last
from suture.surgery.passes.lowering.attention_mask import factors
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.graphs import weightless

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = weightless.FOLDER / "vision" / "sd15_tblock_f16_d18.onnx"
SUM = """<ir_version: 10, opset_import: ["": 18]> g (float[1, 4, 8, 8] x, float[1, 4, 8, 8] y) => (float[1, 4, 8, 8] z)
{ k = ConstantOfShape(ks)  w = ConstantOfShape(ws)  a = Conv(x, k)  b = Conv<pads = [1, 1, 1, 1]>(y, w)  z = Add(a, b) }"""


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
@pytest.mark.parametrize("head_dim", [24, 40, 48, 72, 80, 88, 96, 128, 160])
def test_two_factors_are_the_scale(head_dim, dtype):
    """As they are rounded to the type: no further from it than one number of the type, and at most 2^-13."""
    kind, scale = onnx.helper.tensor_dtype_to_np_dtype(dtype), head_dim**-0.5
    of_query, of_keys = factors(scale, dtype)
    product = float(np.array(of_query).astype(kind)) * float(np.array(of_keys).astype(kind))
    one = float(np.array(scale).astype(kind))
    assert of_query * of_keys == pytest.approx(scale, rel=1e-12)
    assert abs(product / scale - 1) <= min(abs(one / scale - 1) + 1e-12, 2**-13)


def test_the_blocks_attention_is_as_exact_as_half_precision(tmp_path):
    """TensorRT's network of the lowered block, in float16, against onnxruntime's answer in float16: rounding, no more."""
    import onnxruntime as ort

    source = weightless.filled(onnx.load(BLOCK, load_external_data=False))
    onnx.save(source, tmp_path / "source.onnx")
    _, lowered, _ = run_plan(files.read(tmp_path / "source.onnx"), make_plan(SurgeryOptions(cache="growing")))
    model = files.without_shapes(files.to_model(lowered))
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("TRT_Attention"), ops.count("Cast")) == (2, 4)  # the casts are of the factors
    onnx.save(model, tmp_path / "lowered.onnx")
    random = np.random.default_rng(0)
    feeds = {v.name: random.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float16)
             for v in source.graph.input}  # fmt: skip
    session = ort.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feeds)
    target = tmp_path / "lowered.onnx"
    network = Evaluator(describe(target.read_bytes(), target, tmp_path), "cpu")(feeds)
    found = to_numpy(network[session.get_outputs()[0].name])
    error = np.abs(found.astype(np.float64) - expected).max() / np.abs(expected.astype(np.float64)).max()
    assert error < 4e-3


def test_a_pointwise_convolution_is_the_sums_second_operand(tmp_path):
    model = onnx.parser.parse_model(SUM)
    for name, shape in (("ks", [4, 4, 1, 1]), ("ws", [4, 4, 3, 3])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape), name))
    onnx.save(model, tmp_path / "model.onnx")
    graph = files.read(tmp_path / "model.onnx")
    assert pointwise_last.run(graph) == 1
    assert [tensor.name for tensor in graph.nodes("Add")[0].inputs] == ["b", "a"]
    assert pointwise_last.run(graph) == 0


def test_what_counts_as_hindered():
    source = EngineCost(20, 1000, 2)
    assert not EnginePair("g", source, EngineCost(22, 1000, 2)).hindered
    assert EnginePair("g", source, EngineCost(23, 1000, 2)).hindered == "3 kernels more, 2 layers"
    assert EnginePair("g", source, EngineCost(20, 3000, 2)).hindered == "2.0 kB more"
    assert not EnginePair("g", refused="surgery: no").hindered


@pytest.mark.slow
def test_the_block_of_stable_diffusion_is_not_hindered(tmp_path):
    found = compare("block", weightless.filled(onnx.load(BLOCK, load_external_data=False)), tmp_path)
    assert not found.refused
    assert found.lowered.kernels <= found.source.kernels == 23
    assert found.lowered.bytes < found.source.bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sam_vision-dynamo-18-float32", "gpt2-torchscript-14-float32", "llama-torchscript-14-float16"]
)
def test_a_graph_is_not_hindered(name, tmp_path):
    found = compare(name, weightless.load(name), tmp_path)
    assert (found.refused, found.hindered) == ("", "")

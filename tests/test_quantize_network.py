"""Quantised graphs in TensorRT: what its parser understood computes the same, and which scales it takes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from suture.core.as_written import open_session
from suture.core.errors import UserError
from suture.core.network.compare import compare, default_tolerance
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import parse
from suture.core.network.runner import to_numpy
from suture.core.sessions import from_ort, to_ort
from suture.core.weights import load_graph, weights_root
from suture.runtime.graphs import open_graph
from suture.surgery.quantize.formats import FP8, INT4, INT8
from suture.surgery.quantize.rounding import quantise

WEIGHT_ONLY = ("int8", "int4", "int4-awq")
ROUNDED = ("int8-smoothquant", "fp8")


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED])
@pytest.mark.sample("int8")
def test_tensorrt_understands_every_format(quantised, name):
    """In float32 the parsed network computes the same, but for activations that lie half-way between two numbers."""
    folder = quantised("--quantize", name, "--group-size", "64")
    network = parse(folder / "model.trt.onnx")
    model = load_graph(folder / "model.onnx")
    outcomes = compare(Evaluator(network), folder / "model.onnx", make_feeds(model), 1e-5)
    assert default_tolerance(network) == (0.1 if name in ROUNDED else 1e-5)
    for feeds, outcome in zip(make_feeds(model), outcomes):
        if any(output.beyond(1e-5) for output in outcome.outputs):
            assert name in ROUNDED
            assert_parted_by_rounding(network, model, folder, feeds.values)
    assert not any(output.beyond(0.05) for outcome in outcomes for output in outcome.outputs)


def assert_parted_by_rounding(network, model: onnx.ModelProto, folder: Path, feeds: dict) -> None:
    """The first activations that differ were the same before they were rounded, half-way between two numbers, and went
    to either side: float32 sums in another order differ in their last bits, which is all that it takes."""
    rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.output[0] in network.tensors]
    around = [name for node in rounded for name in (node.input[0], node.output[0])]
    names = [name for name in dict.fromkeys(around) if name in network.tensors]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(model, weights_root(folder / "model.onnx"), "with activations")
    given = {value.name: to_ort(feeds[value.name]) for value in session.get_inputs()}
    expected = dict(zip(names, map(from_ort, session.run_with_ort_values(names, given))))
    found = {key: to_numpy(value) for key, value in Evaluator(network)(feeds, keep=names).items() if key in names}
    for node in rounded:
        ours, theirs = (np.asarray(values[node.output[0]], np.float32) for values in (expected, found))
        if (different := ours != theirs).any():
            break
    before = [values[node.input[0]] for values in (expected, found)]
    assert np.abs(before[0] - before[1]).max() < 1e-5 * np.abs(before[0]).max()
    assert different.mean() < 0.01
    eight_bits = expected[node.output[0]].dtype == np.int8
    step = 1 if eight_bits else np.maximum(np.abs(ours), np.abs(theirs))[different] / 8  # fp8 has 3 bits behind the first
    assert np.all(np.abs(ours - theirs)[different] <= step)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    scaled, halves = before[0] / numpy_helper.to_array(scale), (ours + theirs) / 2
    assert np.abs(scaled - halves)[different].max() < 1e-3 * np.abs(scaled).max()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_value_half_way_goes_to_either_side(name, tmp_path):
    """Why graphs that round activations are allowed more than others: x and its nearest neighbours in float32, half-way
    between two numbers of the small type, become both of them; so what computes x may not differ by a bit."""
    values, half = {"int8": (INT8, 2.5), "fp8": (FP8, 17.0)}[name]
    lower, upper = {"int8": (2, 3), "fp8": (16, 18)}[name]
    zero = TensorProto(name="zero", data_type=values.dtype, raw_data=b"\0")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.array(1, np.float32), "scale"), zero]
    graph = helper.make_graph(nodes, "half", infos[:1], infos[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx")
    half = np.float32(half)
    x = np.array([np.nextafter(half, np.float32(0)), half, np.nextafter(half, np.float32(99))])
    evaluated = to_numpy(Evaluator(parse(tmp_path / "model.onnx"))({"x": x})["y"])
    (run,) = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert evaluated.tolist() == run.tolist() == [lower, lower, upper]  # a tie goes to the even one


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.sample(1)
def test_a_quantised_cache_grows(quantised, name):
    folder = quantised("--kv-cache", name, "--cache", "growing")
    graph = open_graph(folder / "model.onnx")
    assert graph.signature.dtype == {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[name]
    assert graph.dtype == TensorProto.FLOAT
    lowered = onnx.load(folder / "model.trt.onnx", load_external_data=False)
    made = {output: node for node in lowered.graph.node for output in node.output}
    for cache in graph.signature.caches:
        assert made[cache.present].op_type == "Concat"
        assert made[cache.present].input[0] == cache.past
        assert made[made[cache.present].input[1]].op_type == "QuantizeLinear"
    network = parse(folder / "model.trt.onnx")
    outcomes = compare(Evaluator(network), folder / "model.onnx", make_feeds(load_graph(folder / "model.onnx")), 1e-4)
    for outcome in outcomes:
        assert not [output for output in outcome.outputs if output.beyond(2e-2)], outcome.feeds
    exact, decoders = open_graph(folder / "float" / "model.onnx"), []
    for each in (exact, graph):
        decoder = each.decoder(2)
        tokens = np.arange(40).reshape(2, 20) * 7
        for step in (tokens[:, :12], tokens[:, 12:13], tokens[:, 13:]):
            last = decoder.step(step, np.full(2, step.shape[1]), np.ones(2, np.float32))
        decoders.append(last)
    error = np.abs(decoders[0] - decoders[1]).max() / np.abs(decoders[0]).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(("values", "taken"), [(INT8, False), (INT4, True)])
def test_scales_are_positive(values, taken, tmp_path):
    """TensorRT's reference asks all scales of a dequantising layer to be strictly positive. Its parser refuses others
    beside int8, and says nothing beside int4: so nothing but this rounding sees to it."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    rows[1] = 0
    q, scales = quantise(rows, values, 32, TensorProto.FLOAT)
    assert (scales > 0).all()
    for sign in (1, -1):
        tensors = [helper.make_tensor("q", values.dtype, [64, 4], q.T.to(torch.int8).flatten().tolist()),
                   numpy_helper.from_array(scales.T.contiguous().numpy() * sign, "scales")]  # fmt: skip
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "scales"], ["w"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2, 64]), ("y", [2, 4]))
        ]
        graph = helper.make_graph(nodes, "scales", infos[:1], infos[1:], tensors)
        path = tmp_path / f"{sign}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        if sign == 1 or taken:
            parse(path)
        else:
            with pytest.raises(UserError, match="Scale coefficients must all be positive"):
                parse(path)

"""Operators of older opsets, brought to opset 24: each computes in onnxruntime what it did at its own."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from suture.core.errors import UserError
from suture.surgery.graph.files import infer_shapes
from suture.surgery.graph.opsets import ADAPTERS, OPSET, upgrade
from tests.test_foreign_graphs import run

GRAPHS = {  # opset and body, from x [2, 4, 6, 6]
    "BatchNormalization": (9, "y = BatchNormalization(x, four, four, four, four)"),
    "Clip": (9, "y = Clip<min = -0.5, max = 0.5>(x)"),
    "Clip without a bound": (9, "y = Clip<max = 0.5>(x)"),
    "Dropout": (10, "y = Dropout<ratio = 0.9>(x)"),
    "GridSample": (16, "g = Tanh(grid) y = GridSample<mode = \"bicubic\">(x, g)"),
    "GridSample's default": (16, "g = Tanh(grid) y = GridSample(x, g)"),
    "GroupNormalization": (18, "y = GroupNormalization<num_groups = 2>(x, two, two)"),
    "Hardmax": (11, "y = Hardmax<axis = 1>(x)"),
    "LogSoftmax": (11, "y = LogSoftmax<axis = 2>(x)"),
    "Pad": (10, "y = Pad<pads = [0, 0, 1, 0, 0, 0, 0, 2], value = 1.5>(x)"),
    "ReduceL2": (13, "y = ReduceL2<axes = [1, 2], keepdims = 0>(x)"),
    "ReduceMax": (13, "y = ReduceMax<axes = [-1]>(x)"),
    "ReduceMean": (17, "y = ReduceMean<axes = [2, 3]>(x)"),
    "ReduceMean of all": (17, "y = ReduceMean<keepdims = 0>(x)"),
    "ReduceSum": (11, "y = ReduceSum<axes = [1]>(x)"),
    "Resize": (10, "y = Resize<mode = \"nearest\">(x, scales)"),
    "Resize with an empty roi": (13, "y = Resize<mode = \"linear\">(x, nothing, scales)"),
    "RoiAlign": (10, "y = RoiAlign<output_height = 2, output_width = 2>(x, boxes, rows)"),
    "Scatter": (9, "y = Scatter<axis = 1>(x, places, x)"),
    "Slice": (9, "y = Slice<starts = [1, 0], ends = [3, 5], axes = [1, 3]>(x)"),
    "Softmax": (11, "y = Softmax<axis = 1>(x)"),
    "Softmax of the last axis": (11, "y = Softmax<axis = 3>(x)"),
    "Softmax's default": (12, "y = Softmax(x)"),
    "Split": (11, "y, z = Split<axis = 1, split = [1, 3]>(x)"),
    "Split without sizes": (13, "y, z = Split<axis = 1>(x)"),
    "Squeeze": (11, "u = ReduceMax<axes = [1]>(x) y = Squeeze<axes = [1]>(u)"),
    "TopK": (9, "y, z = TopK<k = 2, axis = 2>(x)"),
    "Unsqueeze": (12, "y = Unsqueeze<axes = [0, 3]>(x)"),
    "Upsample": (9, "y = Upsample<mode = \"nearest\">(x, scales)"),
}  # fmt: skip
UNRUN = {"DFT"}  # of opset 17, which needs no other adapter than its axis
RUN_AT = {"RoiAlign": 16}  # onnxruntime has no kernel of opset 22, in which only types are new
CONSTANTS = {
    "two": np.array([0.5, 2], np.float32),
    "four": np.array([0.5, 2, 1, 3], np.float32),
    "scales": np.array([1, 1, 2, 3], np.float32),
    "nothing": np.zeros(0, np.float32),
    "grid": np.random.default_rng(1).standard_normal((2, 3, 3, 2)).astype(np.float32),
    "boxes": np.array([[0, 0, 4, 4], [1, 2, 5, 5]], np.float32),
    "rows": np.array([0, 1]),
    "places": np.broadcast_to(np.array([3, 1, 0, 2])[None, :, None, None], (2, 4, 6, 6)).copy(),
}


def model(opset: int, body: str) -> onnx.ModelProto:
    outputs = [name for name in ("y", "z") if f"{name} =" in body or f", {name}" in body.split("=")[0]]
    declared = ", ".join(f"{'int64' if name == 'z' and 'TopK' in body else 'float'}[] {name}" for name in outputs)
    found = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[2, 4, 6, 6] x) => ({declared}) {{ {body} }}'
    )
    for value in found.graph.output:
        value.type.tensor_type.ClearField("shape")
    named = {name for node in found.graph.node for name in node.input}
    found.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in named)
    return found


def test_every_operator_that_has_an_adapter_is_tried():
    tried = {node.op_type for opset, body in GRAPHS.values() for node in model(opset, body).graph.node}
    by_one_function = {op for op in ADAPTERS if op.startswith("Reduce")}
    assert set(ADAPTERS) - tried <= by_one_function | UNRUN


@pytest.mark.parametrize("name", GRAPHS)
def test_it_means_what_it_did(name):
    source = model(*GRAPHS[name])
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    expected = run(source, x)
    found = upgrade(source, "here", infer_shapes)
    assert [entry.version for entry in found.opset_import if not entry.domain] == [OPSET]
    found.opset_import[0].version = RUN_AT.get(name, OPSET)
    for output, values in run(found, x).items():
        assert values.shape == expected[output].shape
        assert np.abs(values - expected[output]).max() <= 1e-5


def test_without_its_adapter_it_means_something_else(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "Softmax", ())
    source, x = model(*GRAPHS["Softmax"]), {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    expected = run(source, x)["y"]
    assert np.abs(run(upgrade(source, "here", infer_shapes), x)["y"] - expected).max() > 0.1


def test_what_is_newer_is_refused_in_one_line():
    source = model(13, "y = Neg(x)")
    source.opset_import[0].version = OPSET + 1
    with pytest.raises(UserError, match=f"opset {OPSET + 1}"):
        upgrade(source, "here", infer_shapes)
    training = model(9, "y, a, b, c, d = BatchNormalization(x, four, four, four, four)")
    with pytest.raises(UserError, match="the statistics of training"):
        upgrade(training, "here", infer_shapes)
    scan = """<ir_version: 3, opset_import: ["" : 8]> g (float[1,2] a, float[1,3,2] x) => (float[1,2] y) { y = Scan("", a, x)
        <num_scan_inputs = 1, body = b (float[2] s, float[2] n) => (float[2] t) { t = Add(s, n) }> }"""
    with pytest.raises(UserError, match="of opset 8 goes over a batch"):
        upgrade(onnx.parser.parse_model(scan), "here", infer_shapes)

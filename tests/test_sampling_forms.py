"""Operators that TensorRT has not, as samplings and products: onnx's own node tests, drawn cases in onnxruntime and TensorRT's network."""

from collections import Counter

import numpy as np
import onnx
import pytest
from lowered_graphs import lowered, network, ran
from onnx import TensorProto, helper

from benchmarks.node_tests import node_tests
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.passes.lowering import affine_grid, deformable_convolution, sampled_levels
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.graphs import weightless

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
PASSES = {"DeformConv": deformable_convolution, "AffineGrid": affine_grid}


def made(op: str, inputs: dict[str, tuple], constants: dict, kind: int, **attributes) -> onnx.ModelProto:
    names = [*inputs, *constants] if op == "AffineGrid" else [
        name if name in inputs else "" for name in ("x", "w", "offset", "b", "mask")
    ]  # fmt: skip
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], **attributes)
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", kind, None)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


DEFORMED = {  # x, w, offset groups, attributes, bias, mask
    "plain": ([2, 3, 7, 5], [4, 3, 3, 3], 1, {}, False, False),
    "modulated, as DCNv2": ([2, 4, 9, 8], [6, 4, 3, 3], 1, {"pads": [1, 1, 1, 1]}, True, True),
    "uneven pads": ([1, 4, 11, 9], [2, 4, 3, 2], 1, {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1]}, True, True),
    "groups of channels and of offsets": ([2, 8, 6, 6], [4, 4, 3, 3], 4, {"group": 2, "pads": [1, 1, 1, 1]}, True, True),
    "one row": ([1, 2, 1, 6], [3, 2, 1, 3], 2, {"pads": [0, 1, 0, 1]}, False, True),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFORMED)
@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_a_deformable_convolution_has_the_same_numbers(case, kind, tmp_path):
    x, w, groups, attributes, biased, masked = DEFORMED[case]
    pads, strides, dilations = (
        attributes.get(name, usual) for name, usual in (("pads", [0] * 4), ("strides", [1, 1]), ("dilations", [1, 1]))
    )
    sides = [
        (x[2 + side] + pads[side] + pads[2 + side] - (w[2 + side] - 1) * dilations[side] - 1) // strides[side] + 1
        for side in (0, 1)
    ]
    taps = groups * w[2] * w[3]
    inputs = {"x": x, "w": w, "offset": [x[0], 2 * taps, *sides]}
    inputs |= {"b": [w[0]]} if biased else {}
    inputs |= {"mask": [x[0], taps, *sides]} if masked else {}
    random, dtype = np.random.default_rng(0), np.float32
    feeds = {name: random.standard_normal(shape).astype(np.float16).astype(dtype) for name, shape in inputs.items()}
    feeds["offset"] = (feeds["offset"] * 2).astype(dtype)  # beyond the edges, too
    model = made("DeformConv", inputs, {}, FLOAT, offset_group=groups, kernel_shape=w[2:], **attributes)
    expected = ran(model, feeds)
    if kind == HALF:
        model = made("DeformConv", inputs, {}, HALF, offset_group=groups, kernel_shape=w[2:], **attributes)
        feeds = {name: value.astype(np.float16) for name, value in feeds.items()}
    matched, product, missed = lowered(model, tmp_path, deformable_convolution, affine_grid)
    assert (matched, missed) == (1, [])
    found = Counter(node.op_type for node in product.graph.node)
    assert (found["GridSample"], found["Conv"], found["DeformConv"]) == (1, 1, 0)
    limit = {FLOAT: 1e-5, HALF: 2e-3}[kind] * np.abs(expected).max()
    assert np.abs(ran(product, feeds).astype(dtype) - expected).max() <= limit
    assert np.abs(network(tmp_path, feeds).astype(dtype) - expected).max() <= limit


def test_half_precision_samples_in_float32(tmp_path):
    """At the far end of a wide row float16 places would be off by a sixteenth of a pixel."""
    wide = 400
    inputs = {"x": [1, 1, 1, wide], "w": [1, 1, 1, 1], "offset": [1, 2, 1, wide]}
    feeds = {"x": np.arange(wide, dtype=np.float16).reshape(1, 1, 1, wide) % 2, "w": np.ones([1, 1, 1, 1], np.float16)}
    feeds["offset"] = np.stack([np.zeros([1, wide]), np.full([1, wide], 0.25)]).astype(np.float16)[None]
    _, product, _ = lowered(
        made("DeformConv", inputs, {}, HALF, kernel_shape=[1, 1]), tmp_path, deformable_convolution, affine_grid
    )
    found = ran(product, feeds)[0, 0, 0, :-1]
    np.testing.assert_allclose(found, np.where(np.arange(wide - 1) % 2, 0.75, 0.25), atol=1e-3)


def test_sizes_that_are_not_known_leave_it(tmp_path):
    inputs = {"x": ["n", 2, "h", 5], "w": [2, 2, 1, 1], "offset": ["n", 2, "h", 5]}
    matched, left, missed = lowered(
        made("DeformConv", inputs, {}, FLOAT, kernel_shape=[1, 1]), tmp_path, deformable_convolution, affine_grid
    )
    assert matched == 0
    assert [node.op_type for node in left.graph.node] == ["DeformConv"]
    assert "sizes are not known" in missed[0].reason


@pytest.mark.parametrize("size", [[2, 3, 4, 5], [1, 1, 3, 4, 2]])
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_an_affine_grid_has_the_same_numbers(size, corners, kind, tmp_path):
    dims = len(size) - 2
    theta = np.random.default_rng(0).standard_normal([size[0], dims, dims + 1]).astype(np.float16)
    exact = made("AffineGrid", {"theta": list(theta.shape)}, {"size": np.array(size)}, FLOAT, align_corners=corners)
    expected = ran(exact, {"theta": theta.astype(np.float32)})
    model = made("AffineGrid", {"theta": list(theta.shape)}, {"size": np.array(size)}, kind, align_corners=corners)
    feeds = {"theta": theta.astype(helper.tensor_dtype_to_np_dtype(kind))}
    matched, product, missed = lowered(model, tmp_path, deformable_convolution, affine_grid)
    assert (matched, missed) == (1, [])
    limit = {FLOAT: 2e-6, HALF: 4e-3}[kind]
    np.testing.assert_allclose(ran(product, feeds).astype(np.float32), expected, atol=limit)
    np.testing.assert_allclose(network(tmp_path, feeds).astype(np.float32), expected, atol=limit)


def test_corners_of_one_pixel_leave_an_affine_grid(tmp_path):
    """onnxruntime takes 1 there, onnx's reference -1, PyTorch 0."""
    model = made("AffineGrid", {"theta": [1, 2, 3]}, {"size": np.array([1, 2, 1, 3])}, FLOAT, align_corners=1)
    matched, _, missed = lowered(model, tmp_path, deformable_convolution, affine_grid)
    assert matched == 0
    assert "no two corners" in missed[0].reason


@pytest.mark.parametrize("op", PASSES)
def test_onnx_own_node_tests(op, tmp_path):
    """Their sizes, which AffineGrid takes as an input, as the constants that they are."""
    cases = [case for case in node_tests([op.lower()], "deform_conv|affine_grid") if case.model.graph.node[0].op_type == op]
    assert len(cases) >= 4
    for case in cases:
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        (inputs, outputs), *_ = case.data_sets
        feeds = {value.name: array for value, array in zip(model.graph.input, inputs)}
        if "size" in feeds:
            model.graph.initializer.append(onnx.numpy_helper.from_array(feeds.pop("size"), "size"))
            del model.graph.input[1]
        matched, product, _ = lowered(model, tmp_path, deformable_convolution, affine_grid)
        assert matched == 1
        np.testing.assert_allclose(ran(product, feeds), outputs[0], rtol=1e-4, atol=2e-5)


LEVELS = ((6, 8), (3, 4), (2, 2))  # height and width
HEADS, WIDTH, QUERIES, POINTS = 2, 4, 5, 3


def attention(form: str, kind: int = FLOAT, queries: int | str = QUERIES) -> onnx.ModelProto:
    """Multi-scale deformable attention from its samples on: of mmcv and transformers stacked, else side by side."""
    nodes, parts = [], []
    constants = {"last": [-1], "before": [-2], "flat": [HEADS, WIDTH, -1 if queries == "q" else queries, len(LEVELS) * POINTS]}
    inputs = {"w": [HEADS, 1, queries, len(LEVELS) * POINTS]}
    for level, sides in enumerate(LEVELS):
        inputs |= {f"x{level}": [HEADS, WIDTH, *sides], f"at{level}": [HEADS, queries, POINTS, 2]}
        nodes.append(helper.make_node("GridSample", [f"x{level}", f"at{level}"], [f"s{level}"], mode="linear", align_corners=0))
        parts.append(f"s{level}")
    if form == "stacked":
        nodes += [helper.make_node("Unsqueeze", [part, "before"], [f"u{part}"]) for part in parts]
        nodes += [
            helper.make_node("Concat", [f"u{part}" for part in parts], ["stack"], axis=-2),
            helper.make_node("Reshape", ["stack", "flat"], ["all"]),
        ]
    else:
        nodes.append(helper.make_node("Concat", parts, ["all"], axis=3))
    nodes += [helper.make_node("Mul", ["w", "all"], ["m"]), helper.make_node("ReduceSum", ["m", "last"], ["y"], keepdims=0)]
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()]
    tensors = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", kind, None)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("form", ["stacked", "side by side"])
@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_levels_are_summed_one_by_one(form, kind, tmp_path):
    model, random = attention(form, kind), np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    feeds = {
        value.name: random.uniform(-1.2, 1.2, [dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(dtype)
        for value in model.graph.input
    }
    matched, summed, missed = lowered(model, tmp_path, sampled_levels)
    assert (matched, missed) == (1, [])
    found = Counter(node.op_type for node in summed.graph.node)
    assert found == {"GridSample": 3, "Slice": 3, "Mul": 3, "ReduceSum": 3, "Add": 2}
    expected, limit = ran(model, feeds), {FLOAT: 1e-6, HALF: 4e-3}[kind]
    np.testing.assert_allclose(ran(summed, feeds), expected, atol=limit, rtol=limit)
    np.testing.assert_allclose(network(tmp_path, feeds), expected, atol=limit, rtol=limit)


def test_levels_that_may_not_be_the_last_axis_stay(tmp_path):
    matched, _, missed = lowered(attention("stacked", queries="q"), tmp_path, sampled_levels)
    assert matched == 0
    assert "not known to be flattened" in missed[0].reason


@pytest.mark.parametrize(
    "name",
    [
        "deformable_detr_attention-dynamo-18-float32",
        "rt_detr_attention-dynamo-18-float16",
        "rt_detr_attention-torchscript-17-float32",
    ],
)
def test_transformers_deformable_attention_is_recognised(name, tmp_path):
    """Through all of surgery, from what torch exports of it."""
    source = weightless.load(f"vision/{name}")
    onnx.save(source, tmp_path / "source.onnx")
    _, graph, report = run_plan(files.read(tmp_path / "source.onnx"), make_plan(SurgeryOptions()))
    assert {each.name: each.matches for each in report.passes}["sampled_levels"] == 1
    onnx.save(summed := files.without_shapes(files.to_model(graph)), tmp_path / "lowered.onnx")
    found = Counter(node.op_type for node in summed.graph.node)
    assert (found["GridSample"], found["ReduceSum"]) == (3, 3)  # each level by itself
    random, feeds = np.random.default_rng(0), {}
    for value in source.graph.input:
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = random.uniform(-0.2, 1.2, [dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(kind)
    expected, limit = ran(source, feeds), 1e-5 if name.endswith("32") else 1e-2
    np.testing.assert_allclose(ran(summed, feeds), expected, atol=limit, rtol=limit)
    np.testing.assert_allclose(network(tmp_path, feeds), expected, atol=limit, rtol=limit)

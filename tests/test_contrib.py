"""onnxruntime's own ops in standard ones: each op by itself against onnxruntime's kernel, and whole graphs of its builder."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from contracts.head_sizes import write_head_sizes
from contracts.manifest import read_manifest
from contracts.signature import find_signature
from contracts.weights import load_graph, weights_root
from surgery import files
from surgery.contrib import CONTRIB
from surgery.foreign_shapes import declare_shapes
from surgery.runner import make_plan, operate
from tests import decoding
from tests.graphs import weightless

ROOT = Path(__file__).parents[1]
DIALECTS = ROOT.parent / "shared" / "dialects"
FLOAT, FLOAT16, INT64, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
TOLERANCE = {FLOAT: 1e-5, FLOAT16: 5e-3}
BATCH, STEPS, PAST = 2, 3, 4
DTYPES = {FLOAT: np.float32, FLOAT16: np.float16}


class Case:
    """A graph of one com.microsoft op (or of SimplifiedLayerNormalization) and what it is fed."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.inputs, self.weights, self.feeds = [], [], {}

    def feed(self, name: str, values: np.ndarray, shape: list | None = None) -> str:
        self.feeds[name] = values
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(values.shape) if shape is None else shape))
        return name

    def x(self, name: str, *shape: int, dtype: int = FLOAT) -> str:
        symbols = ["batch", "sequence"] if len(shape) == 3 else []
        return self.feed(name, self.normal(*shape).astype(DTYPES[dtype]), [*symbols, *shape[len(symbols) :]])

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape).astype(np.float32)

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def model(self, op: str, inputs: list[str], outputs: list[str], dtype: int = FLOAT, domain: str = "com.microsoft", **attrs):
        node = helper.make_node(op, inputs, outputs, name="/model/layers.0/part/node", domain=domain, **attrs)
        cache = ["batch", "kv_heads", "total", "kv_cache_dim"]
        shapes = {name: cache if name.startswith("present") else None for name in outputs if name}
        ends = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()]
        graph = helper.make_graph([node], "g", self.inputs, ends, self.weights)
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def standard(model: onnx.ModelProto, folder: Path):
    """What the passes over com.microsoft ops make of it, and their report."""
    onnx.save(model, folder / "source.onnx")
    plan = make_plan("growing", 8, "all", own=[])
    names = {module.__name__.rsplit(".", 1)[-1] for module in CONTRIB}
    plan = type(plan)(tuple(each for each in plan.portable if each.name in names), ())
    graph, _, report = operate(files.read(folder / "source.onnx"), plan)
    return files.to_model(graph), report


def ops(model: onnx.ModelProto) -> Counter:
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)


def check(case: Case, model: onnx.ModelProto, folder: Path, dtype: int = FLOAT, extra: dict | None = None) -> Counter:
    """Runs both forms on the same inputs and says which ops the standard one has."""
    found, _ = standard(model, folder)
    assert all(not node.domain for node in found.graph.node), ops(found)
    expected = run(model, case.feeds)
    for one, other in zip(expected, run(found, case.feeds | (extra or {})), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.isfinite(one.astype(np.float32)).all()
        error = np.abs(one.astype(np.float32) - other.astype(np.float32)).max() / np.abs(one.astype(np.float32)).max()
        assert error < TOLERANCE[dtype]
    return ops(found)


def refused(model: onnx.ModelProto, folder: Path) -> str:
    """The reason why the op stayed as it was."""
    found, report = standard(model, folder)
    assert [node.op_type for node in found.graph.node if node.domain] == [model.graph.node[0].op_type]
    return next(miss.reason for each in report.passes for miss in each.near_misses)


# --- norms, activations, products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
@pytest.mark.parametrize("bias", [False, True])
def test_skip_norms(op, bias, dtype, tmp_path):
    case = Case()
    inputs = [case.x("x", BATCH, STEPS, 16, dtype=dtype), case.x("skip", BATCH, STEPS, 16, dtype=dtype)]
    names = ["weight", *["shift"] * (op == "SkipLayerNormalization"), *["bias"] * bias]
    inputs += [case.weight(name, case.normal(16).astype(DTYPES[dtype])) for name in names]
    model = case.model(op, inputs, ["y", "", "", "sum"], dtype, epsilon=1e-3)
    norm = "RMSNormalization" if "Simplified" in op else "LayerNormalization"
    assert check(case, model, tmp_path, dtype) == {norm: 1, "Add": 1 + bias}


def test_default_epsilon_of_a_skip_norm(tmp_path):
    case = Case()
    inputs = [case.feed("x", np.full((1, 1, 8), 1e-5, np.float32)), case.feed("skip", case.normal(1, 1, 8) * 1e-5)]
    model = case.model("SkipSimplifiedLayerNormalization", [*inputs, case.weight("weight", case.normal(8))], ["y"])
    check(case, model, tmp_path)


@pytest.mark.parametrize(("x", "weight"), [(FLOAT, FLOAT), (FLOAT16, FLOAT), (FLOAT, FLOAT16)])
def test_simplified_norm(x, weight, tmp_path):
    case = Case()
    inputs = [case.x("x", BATCH, STEPS, 16, dtype=x), case.weight("weight", case.normal(16).astype(DTYPES[weight]))]
    model = case.model("SimplifiedLayerNormalization", inputs, ["y"], weight, domain="", axis=-1, epsilon=1e-3)
    assert check(case, model, tmp_path, FLOAT if x == weight else FLOAT16)["RMSNormalization"] == 1


def test_statistics_of_a_norm_are_refused(tmp_path):
    case = Case()
    inputs = [case.x("x", BATCH, STEPS, 16), case.x("skip", BATCH, STEPS, 16), case.weight("weight", case.normal(16))]
    model = case.model("SkipSimplifiedLayerNormalization", inputs, ["y", "mean", "inv_std_var"])
    assert "output mean" in refused(model, tmp_path)


@pytest.mark.parametrize(("op", "bias", "attrs", "expected"), [
    ("Gelu", False, {}, {"Gelu": 1}),
    ("BiasGelu", True, {}, {"Add": 1, "Gelu": 1}),
    ("FastGelu", False, {}, {"Gelu": 1}),
    ("FastGelu", True, {}, {"Add": 1, "Gelu": 1}),
    ("QuickGelu", False, {}, {"Swish": 1}),
    ("QuickGelu", False, {"alpha": 1.3}, {"Swish": 1}),
])  # fmt: skip
def test_gelus(op, bias, attrs, expected, tmp_path):
    case = Case()
    inputs = [case.x("x", BATCH, STEPS, 16), *[case.weight("bias", case.normal(16))] * bias]
    assert check(case, case.model(op, inputs, ["y"], **attrs), tmp_path) == expected


@pytest.mark.parametrize(("a", "b", "attrs", "expected"), [
    ((2, 3, 4), (2, 4, 5), {}, {"MatMul": 1}),
    ((2, 3, 4), (2, 5, 4), {"transB": 1, "alpha": 0.3}, {"Transpose": 1, "MatMul": 1, "Mul": 1}),
    ((2, 2, 4, 3), (2, 2, 5, 4), {"transA": 1, "transB": 1}, {"Transpose": 2, "MatMul": 1}),
])  # fmt: skip
def test_fused_matmul(a, b, attrs, expected, tmp_path):
    case = Case()
    inputs = [case.feed("a", case.normal(*a)), case.feed("b", case.normal(*b))]
    assert check(case, case.model("FusedMatMul", inputs, ["y"], **attrs), tmp_path) == expected


def test_transposed_batches_are_refused(tmp_path):
    case = Case()
    inputs = [case.feed("a", case.normal(3, 2, 4)), case.feed("b", case.normal(2, 4, 5))]
    assert "batch" in refused(case.model("FusedMatMul", inputs, ["y"], transBatchA=1), tmp_path)


# --- quantised weights ----------------------------------------------------------------------------------------------


def nbits(case: Case, bits: int, block: int, features: int, outputs: int, zero_points: str, bias: bool, dtype: int, **changed):
    """A MatMulNBits over x [B, S, features]; zero_points: absent, middle, packed or float."""
    blocks, middle = features // block, 1 << (bits - 1)
    kind = DTYPES[dtype]
    inputs = [case.x("x", BATCH, STEPS, features, dtype=dtype)]
    packed = case.random.integers(0, 256, (outputs, blocks, block * bits // 8), np.uint8)
    inputs += [case.weight("B", packed), case.weight("scales", (case.normal(outputs, blocks) * 0.1).astype(kind))]
    points = case.random.integers(0, 1 << bits, (outputs, blocks))
    points = np.full_like(points, middle) if zero_points == "middle" else points
    if zero_points == "float":
        inputs.append(case.weight("zero_points", points.astype(kind)))
    elif zero_points != "absent":
        points = points.astype(np.uint8)
        if bits == 4:
            points = np.pad(points, ((0, 0), (0, blocks % 2)))
            points = points[:, 0::2] | (points[:, 1::2] << 4)
        inputs.append(case.weight("zero_points", points))
    if bias:
        inputs += [*["", ""][: 5 - len(inputs)], case.weight("bias", case.normal(outputs).astype(kind))]
    attrs = {"K": features, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 1}
    return case.model("MatMulNBits", inputs, ["y"], dtype, **attrs | changed)


@pytest.mark.parametrize(("bits", "block", "outputs", "zero_points", "bias", "dtype"), [
    (4, 32, 24, "absent", False, FLOAT),
    (4, 16, 7, "absent", True, FLOAT16),
    (4, 32, 24, "middle", True, FLOAT),
    (4, 64, 24, "packed", False, FLOAT),
    (4, 32, 7, "packed", True, FLOAT16),
    (4, 16, 24, "float", True, FLOAT),
    (8, 32, 24, "absent", False, FLOAT),
    (8, 16, 24, "packed", True, FLOAT),
])  # fmt: skip
def test_matmul_of_few_bits(bits, block, outputs, zero_points, bias, dtype, tmp_path):
    case = Case()
    model = nbits(case, bits, block, 192, outputs, zero_points, bias, dtype)
    shifted = zero_points in ("packed", "float") or bits == 8  # negative scales
    found = check(case, model, tmp_path, dtype)
    assert found["MatMul"] == 1 + shifted
    assert found["DequantizeLinear"] == 1
    assert found["Add"] == shifted + bias
    converted, _ = standard(model, tmp_path)
    quantised = next(node for node in converted.graph.node if node.op_type == "DequantizeLinear")
    weights = {tensor.name: tensor for tensor in converted.graph.initializer}
    assert len(quantised.input) == 2
    assert weights[quantised.input[0]].data_type == {4: TensorProto.INT4, 8: TensorProto.INT8}[bits]
    scales = numpy_helper.to_array(weights[quantised.input[1]])
    assert bits == 4 or (scales >= 0).all()  # TensorRT's parser takes no negative ones beside int8


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("K", 190, "whole number of blocks"), ("bits", 2, "2 bits"), ("weight_prepacked", 1, "one kind of GPU"),
])  # fmt: skip
def test_what_a_matmul_of_few_bits_cannot_be(name, value, reason, tmp_path):
    model = nbits(Case(), 4, 32, 192, 8, "absent", False, FLOAT, weight_prepacked=0)
    next(each for each in model.graph.node[0].attribute if each.name == name).i = value
    assert reason in refused(model, tmp_path)


def test_reordered_features_are_refused(tmp_path):
    case = Case()
    model = nbits(case, 4, 32, 192, 8, "absent", False, FLOAT)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(192, dtype=np.int32), "g_idx"))
    model.graph.node[0].input.extend(["", "g_idx"])
    assert "g_idx" in refused(model, tmp_path)


def test_repacked_weights_stream_to_a_file_beside_the_graph(tmp_path):
    """A weight above the limit goes to repacked.data, the source's folder stays as it is, the result runs."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    case = Case()
    model = nbits(case, 4, 32, 768, 512, "packed", True, FLOAT)
    expected = run(model, case.feeds)[0]
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    before = sorted(path.name for path in source.iterdir())
    command = [sys.executable, "-m", "surgery", str(source / "model.onnx"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in source.iterdir()) == before
    assert (out / "repacked.data").stat().st_size >= 768 * 512 // 2
    assert read_manifest(out)["weights_root"] == "."
    assert (out / "weights.data").exists()
    assert (out / "model.onnx").stat().st_size < 768 * 512 // 2
    session = ort.SessionOptions()
    session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    found = ort.InferenceSession(str(out / "model.onnx"), session, providers=["CPUExecutionProvider"]).run(None, case.feeds)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "zero_points"), [(4, "absent"), (4, "other"), (8, "absent")])
@pytest.mark.parametrize("reshaped", [False, True])
def test_gather_of_few_bits(bits, zero_points, reshaped, tmp_path):
    case = Case()
    rows, features, block = 11, 64, 32
    packed = case.random.integers(0, 256, (rows, features * bits // 8), np.uint8)
    tokens = case.feed("input_ids", case.random.integers(0, rows, (BATCH, STEPS)))
    inputs = [case.weight("B", packed), tokens, case.weight("scales", case.normal(rows, features // block))]
    if zero_points == "other":
        inputs.append(case.weight("zero_points", case.random.integers(0, 256, (rows, features // block // 2), np.uint8)))
    attrs = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    model = case.model("GatherBlockQuantized", inputs, ["y"], **attrs)
    if reshaped:  # the head's weight, as onnxruntime-genai shares it
        model.graph.initializer[0].dims[:] = [rows, features // block, block * bits // 8]
        model.graph.initializer.append(numpy_helper.from_array(np.array(packed.shape), "shape"))
        model.graph.node.insert(0, helper.make_node("Reshape", ["B", "shape"], ["table"]))
        model.graph.node[1].input[0] = "table"
    assert check(case, model, tmp_path) == {"DequantizeLinear": 1, "Gather": 1}


@pytest.mark.parametrize("zero_points", ["eight", "other"])
def test_unsigned_weights_become_signed(zero_points, tmp_path):
    case = Case()
    x = case.x("x", BATCH, STEPS, 64)
    values, scales = case.random.integers(0, 16, (64, 24)), case.normal(2, 24)
    points = np.full((2, 24), 8) if zero_points == "eight" else case.random.integers(0, 16, (2, 24))
    model = case.model("MatMul", [x, "w"], ["y"], domain="")
    for name, array in (("B", values), ("zero_points", points)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.UINT4, array.shape, array.ravel().tolist()))
    model.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    quantised = helper.make_node("DequantizeLinear", ["B", "scales", "zero_points"], ["w"], axis=0, block_size=32)
    model.graph.node.insert(0, quantised)
    found = check(case, model, tmp_path)
    assert found["MatMul"] == (1 if zero_points == "eight" else 2)
    converted, _ = standard(model, tmp_path)
    assert TensorProto.UINT4 not in {tensor.data_type for tensor in converted.graph.initializer}


# --- rotary embedding and attention ---------------------------------------------------------------------------------


def tables(case: Case, width: int, dtype: int = FLOAT, longest: int = 16) -> list[str]:
    angles = np.arange(longest)[:, None] * 0.7 ** np.arange(width)
    return [case.weight(name, f(angles).astype(DTYPES[dtype])) for name, f in (("cos", np.cos), ("sin", np.sin))]


@pytest.mark.parametrize(("shape", "width", "attrs"), [
    ((BATCH, STEPS, 32), 4, {}),  # num_heads = 0: the tables span a head
    ((BATCH, STEPS, 32), 4, {"interleaved": 1}),
    ((BATCH, STEPS, 32), 2, {"num_heads": 4, "rotary_embedding_dim": 4}),
    ((BATCH, 4, STEPS, 8), 4, {}),
    ((BATCH, 4, STEPS, 8), 2, {"num_heads": 4, "rotary_embedding_dim": 4}),
])  # fmt: skip
@pytest.mark.parametrize("offset", [False, True])
def test_rotary_embedding(shape, width, attrs, offset, tmp_path):
    case = Case()
    positions = np.array([5]) if offset else np.array([[0, 1, 2], [7, 8, 9]])
    x = case.feed("x", case.normal(*shape), ["batch", *shape[1:]] if len(shape) == 4 else ["batch", "sequence", shape[2]])
    inputs = [x, case.feed("position_ids", positions), *tables(case, width)]
    found = check(case, case.model("RotaryEmbedding", inputs, ["y"], **attrs), tmp_path)
    assert found["RotaryEmbedding"] == 1


def test_packed_batches_are_refused(tmp_path):
    case = Case()
    inputs = [case.x("x", BATCH, STEPS, 32), case.feed("position_ids", np.zeros((BATCH, STEPS), np.int64)), *tables(case, 4)]
    model = case.model("RotaryEmbedding", inputs, ["y"], is_packed_batching=1)
    assert "packed" in refused(model, tmp_path)


HEADS, KV_HEADS, DIM = 4, 2, 32


def grouped(case: Case, *, packed: bool, rotary: int = 0, past: int = 0, steps: int = STEPS, dtype: int = FLOAT, **attrs):
    """GroupQueryAttention as genai's graphs have it, its lengths computed from attention_mask. rotary: tables' width."""
    kind, total = DTYPES[dtype], past + steps
    case.feed("input_ids", np.zeros((BATCH, steps), np.int64), ["batch", "sequence"])
    case.feed("attention_mask", np.ones((BATCH, total), np.int64), ["batch", "total"])
    sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    if packed:
        inputs = [case.x("qkv", BATCH, steps, sum(sizes), dtype=dtype), "", ""]
    else:
        inputs = [case.x(name, BATCH, steps, size, dtype=dtype) for name, size in zip("qkv", sizes)]
    for name in ("past_key", "past_value"):
        values = case.normal(BATCH, KV_HEADS, past, DIM).astype(kind)
        inputs.append(case.feed(name, values, ["batch", KV_HEADS, "past", "kv_cache_dim"]))
    inputs += ["seqlens_k", "total_length", *(tables(case, rotary, dtype) if rotary else [])]
    outputs = ["logits", "present_key", "present_value"]
    model = case.model("GroupQueryAttention", inputs, outputs, dtype, num_heads=HEADS, kv_num_heads=KV_HEADS,
                       do_rotary=int(bool(rotary)), **attrs)  # fmt: skip
    constants = {"one": np.array([1]), "axis": np.array(1)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    before = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=INT32),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "axis"], ["length"], axis=0),
        helper.make_node("Cast", ["length"], ["total_length"], to=INT32),
    ]
    for place, node in enumerate(before):
        model.graph.node.insert(place, node)
    return model


@pytest.mark.parametrize("past", [0, PAST])
@pytest.mark.parametrize(("packed", "rotary", "dtype", "attrs"), [
    (True, DIM // 2, FLOAT, {}),
    (False, DIM // 2, FLOAT, {"scale": 0.3}),
    (False, 0, FLOAT, {}),
    (True, DIM // 4, FLOAT, {}),  # partial
    (True, DIM // 2, FLOAT, {"rotary_interleaved": 1}),
    (True, DIM // 2, FLOAT16, {}),
])  # fmt: skip
def test_grouped_query_attention(packed, rotary, dtype, attrs, past, tmp_path):
    case = Case()
    steps = 1 if past else STEPS  # the kernel takes a chunk over a cache for one row only
    model = grouped(case, packed=packed, rotary=rotary, past=past, steps=steps, dtype=dtype, **attrs)
    positions = {"position_ids": np.tile(np.arange(past, past + steps), (BATCH, 1))}
    found = check(case, model, tmp_path, dtype, extra=positions)
    assert found["Attention"] == 1
    assert found["RotaryEmbedding"] == 2 * bool(rotary)
    assert found["Concat"] >= 2


def test_rotation_inside_takes_positions_from_a_new_input(tmp_path):
    converted, _ = standard(grouped(Case(), packed=True, rotary=DIM // 2), tmp_path)
    signature = find_signature(converted, need_caches=False)
    assert signature.positions == "position_ids"
    assert signature.mask == "attention_mask"
    converted, _ = standard(grouped(Case(), packed=True), tmp_path)
    assert find_signature(converted, need_caches=False).positions is None


def test_norms_of_heads_inside(tmp_path):
    """onnxruntime's CPU kernel has no such norms: the reference is the op without them over heads normed by hand."""
    case = Case()
    model = grouped(case, packed=False, rotary=DIM // 2)
    weights = {side: 1 + case.normal(DIM) for side in "qk"}
    model.graph.initializer.extend(numpy_helper.from_array(value, f"{side}_norm") for side, value in weights.items())
    model.graph.node[-1].input.extend(["", "", "", "", "", "q_norm", "k_norm"])
    model.graph.node[-1].attribute.append(helper.make_attribute("qk_norm_epsilon", 1e-3))
    converted, _ = standard(model, tmp_path)
    found = run(converted, case.feeds | {"position_ids": np.tile(np.arange(STEPS), (BATCH, 1))})
    normed = dict(case.feeds)
    for side, weight in weights.items():
        heads = case.feeds[side].reshape(BATCH, STEPS, -1, DIM)
        heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-3) * weight
        normed[side] = heads.reshape(BATCH, STEPS, -1).astype(np.float32)
    expected = run(grouped(Case(), packed=False, rotary=DIM // 2), normed)
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(("change", "reason"), [
    ({"local_window_size": 8}, "window of 8"), ({"softcap": 30.0}, "caps scores"), ({"smooth_softmax": 1}, "smooth_softmax"),
    ({"causal": 0}, "not causal"), ({"k_quant_type": "PER_TENSOR"}, "quantised"),
])  # fmt: skip
def test_grouped_query_attention_that_has_no_standard_form(change, reason, tmp_path):
    assert reason in refused_last(grouped(Case(), packed=True, rotary=DIM // 2, **change), tmp_path)


@pytest.mark.parametrize(("place", "name"), [(10, "attention_bias"), (11, "head_sink")])
def test_inputs_of_grouped_query_attention_that_have_no_standard_form(place, name, tmp_path):
    case = Case()
    model = grouped(case, packed=True, rotary=DIM // 2)
    model.graph.initializer.append(numpy_helper.from_array(case.normal(HEADS), name))
    model.graph.node[-1].input.extend(["", *[""] * (place - 10), name])
    assert name in refused_last(model, tmp_path)


def test_other_lengths_than_the_masks_are_refused(tmp_path):
    model = grouped(Case(), packed=True)
    next(node for node in model.graph.node if node.op_type == "Sub").op_type = "Add"
    assert "sum(attention_mask) - 1" in refused_last(model, tmp_path)


def refused_last(model: onnx.ModelProto, folder: Path) -> str:
    found, report = standard(model, folder)
    assert [node.op_type for node in found.graph.node if node.domain] == ["GroupQueryAttention"]
    assert report.unfused
    assert report.unfused[0]["reason"]
    return next(miss.reason for each in report.passes for miss in each.near_misses)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("past", [0, PAST])
@pytest.mark.parametrize(("padding", "attention_bias", "unidirectional"), [
    (False, False, 0), (False, False, 1), (True, False, 0), (False, True, 0), (True, True, 1),
])  # fmt: skip
def test_multi_head_attention(bias, past, padding, attention_bias, unidirectional, tmp_path):
    case = Case()
    total = past + STEPS
    case.feed("input_ids", np.zeros((BATCH, STEPS), np.int64), ["batch", "sequence"])
    inputs = [case.x(name, BATCH, STEPS, HEADS * DIM) for name in "qkv"]
    inputs.append(case.weight("bias", case.normal(3 * HEADS * DIM)) if bias else "")
    mask = np.ones((BATCH, total), np.int32)
    mask[1, :2] = 0
    inputs.append(case.feed("key_mask", mask, ["batch", "total"]) if padding else "")
    scores = case.normal(BATCH, 1, STEPS, total)
    inputs.append(case.feed("attention_bias", scores, ["batch", 1, "sequence", "total"]) if attention_bias else "")
    outputs = ["logits"]
    if past:
        shape = ["batch", HEADS, "past", DIM]
        inputs += [case.feed(f"past_{side}", case.normal(BATCH, HEADS, past, DIM), shape) for side in "kv"]
        outputs += ["present_k", "present_v"]
    model = case.model("MultiHeadAttention", inputs, outputs, num_heads=HEADS, unidirectional=unidirectional)
    found = check_rows(case, model, tmp_path, padded=padding and unidirectional)
    assert found["Attention"] == 1
    assert found["Concat"] >= (2 if past else 0)


def check_rows(case: Case, model: onnx.ModelProto, folder: Path, padded: bool) -> Counter:
    """As check, but of a row that sees nothing at all (padding on the left, seen causally) the result is unspecified."""
    if not padded:
        return check(case, model, folder)
    found, _ = standard(model, folder)
    expected, result = run(model, case.feeds), run(found, case.feeds)
    assert np.abs(expected[0][0] - result[0][0]).max() < 1e-5
    assert np.abs(expected[0][1, -1] - result[0][1, -1]).max() < 1e-5
    return ops(found)


def side_by_side(case: Case, form: str) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]:
    """A packed MultiHeadAttention, one with separate inputs, which the CPU's kernel takes, and inputs for both."""
    separate = [case.x(name, BATCH, STEPS, HEADS * DIM) for name in "qkv"]
    plain = case.model("MultiHeadAttention", separate, ["logits"], num_heads=HEADS)
    heads = {name: case.feeds[name].reshape(BATCH, STEPS, HEADS, DIM) for name in "qkv"}
    packed = np.stack([heads[name] for name in form], axis=3)
    case.inputs = case.inputs[: 3 - len(form)]
    inputs = [*"q"[: 3 - len(form)], case.feed("packed", packed, ["batch", "sequence", *packed.shape[2:]])]
    return case.model("MultiHeadAttention", inputs, ["logits"], num_heads=HEADS), plain, case.feeds


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_packed_projections_of_multi_head_attention(form, tmp_path):
    packed, plain, feeds = side_by_side(Case(), form)
    found, _ = standard(packed, tmp_path)
    assert ops(found)["Attention"] == 1
    assert np.abs(run(found, feeds)[0] - run(plain, feeds)[0]).max() < 1e-5


@pytest.mark.parametrize("cached", [False, True])
def test_cross_attention(cached, tmp_path):
    case, source = Case(), 5
    inputs = [case.x("q", BATCH, STEPS, HEADS * DIM)]
    shape = (BATCH, HEADS, source, DIM) if cached else (BATCH, source, HEADS * DIM)
    inputs += [case.feed(f"cross_{side}", case.normal(*shape)) for side in "kv"]
    found = check(case, case.model("MultiHeadAttention", inputs, ["logits"], num_heads=HEADS), tmp_path)
    assert found["Attention"] == 1


def test_lengths_as_padding_are_refused(tmp_path):
    case = Case()
    inputs = [*(case.x(name, BATCH, STEPS, HEADS * DIM) for name in "qkv"), ""]
    inputs.append(case.feed("lengths", np.array([3, 2], np.int32)))
    assert "lengths" in refused(case.model("MultiHeadAttention", inputs, ["logits"], num_heads=HEADS), tmp_path)


# --- whole graphs of onnxruntime-genai's builder ----------------------------------------------------------------------

llama = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
GENAI = {
    "llama-int4-asymmetric": llama | {"DequantizeLinear": 11},
    "llama-int4-tied": llama | {"DequantizeLinear": 12},
    "phi-float32": {"Attention": 2, "LayerNormalization": 3, "RotaryEmbedding": 4, "Gelu": 2, "TensorScatter": 4},
    "qwen3-float16": llama | {"RMSNormalization": 9},  # MultiHeadAttention over repeated keys and values
}
FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Swish", "Gelu", "TensorScatter",
         "DequantizeLinear")  # fmt: skip


def at_full_accuracy(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":  # 4 lets onnxruntime round x to 8 bits
                attribute.i = 1
    return model


def whole(source: onnx.ModelProto, folder: Path, cache: str) -> tuple[onnx.ModelProto, list]:
    onnx.save(source, folder / "source.onnx")
    portable, _, report = operate(files.read(folder / "source.onnx"), make_plan(cache, 32, "all"))
    return files.to_model(portable), report.unfused


@pytest.mark.parametrize("name", GENAI)
def test_graphs_of_the_builder(name, tmp_path, monkeypatch):
    if name == "qwen3-float16":  # its mask takes a prompt or one token
        monkeypatch.setattr(decoding, "SCHEDULE", ([7, 3, 5], [1, 1, 1], [1, 0, 1], [1, 1, 1]))
    source = at_full_accuracy(weightless.load(f"genai/{name}"))
    portable, unfused = whole(source, tmp_path, "static")
    found = ops(portable)
    assert {op: found[op] for op in FUSED if found[op]} == GENAI[name]
    assert unfused == []
    onnx.checker.check_model(portable, full_check=True)
    reference = decoding.decode(source, alone=True)
    tolerance = 2e-2 if name.endswith("float16") else 1e-4
    assert decoding.largest_error(reference, decoding.decode(portable, alone=False)) < tolerance
    growing, _ = whole(source, tmp_path, "growing")
    assert ops(growing)["TensorScatter"] == 0
    assert decoding.largest_error(reference, decoding.decode(growing, alone=True)) < tolerance


def test_a_disturbed_zero_point_shows(tmp_path):
    """The comparison above sees one block of one weight."""
    source = at_full_accuracy(weightless.load("genai/llama-int4-asymmetric"))
    portable, _ = whole(source, tmp_path, "static")
    shift = next(tensor for tensor in portable.graph.initializer if tensor.name.endswith("_shift"))
    values = numpy_helper.to_array(shift).copy()
    values[1] += 0.05
    shift.CopyFrom(numpy_helper.from_array(values, shift.name))
    assert decoding.largest_error(decoding.decode(source, alone=True), decoding.decode(portable, alone=False)) > 1e-4


@pytest.mark.skipif(not DIALECTS.is_dir(), reason="needs ../shared/dialects")
@pytest.mark.parametrize(("name", "expected", "tolerance"), [
    ("ort_genai018_qwen2_fp16_cuda", llama, 2e-2),
    ("ort_genai018_qwen2_int4_cpu", llama | {"DequantizeLinear": 11}, 1e-4),
])  # fmt: skip
def test_shared_dialects(name, expected, tolerance, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(DIALECTS / name, source)  # surgery links weights, and links of theirs would make onnx refuse them
    model = at_full_accuracy(load_graph(source / "model.onnx"))
    command = [sys.executable, "-m", "surgery", str(source / "model.onnx"), "--out", str(out), "--capacity", "32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    portable = load_graph(out / "model.onnx")
    counts = ops(portable)
    assert {op: counts[op] for op in FUSED if counts[op]} == expected
    assert all(not node.domain for node in portable.graph.node)
    reference = decoding.decode(model, alone=True, root=source)
    found = decoding.decode(portable, alone=False, root=weights_root(out / "model.onnx"))
    assert decoding.largest_error(reference, found) < tolerance
    command = [sys.executable, "-m", "build", str(out / "model.trt.onnx"), "--out", str(tmp_path / "engine")]
    assert subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_weights_from_elsewhere_join_the_repacked_ones(tmp_path):
    """All weights of a graph lie under one root: those of a checkpoint elsewhere are linked beside the new ones."""
    checkpoint, source, out = tmp_path / "checkpoint", tmp_path / "source", tmp_path / "out"
    for folder in (checkpoint, source):
        folder.mkdir()
    case = Case()
    model = nbits(case, 4, 32, 768, 512, "absent", True, FLOAT)
    expected = run(model, case.feeds)[0]
    onnx.save(model, checkpoint / "model.onnx", save_as_external_data=True, location="blobs", size_threshold=0)
    (checkpoint / "model.onnx").rename(source / "model.onnx")
    manifest = {"weights_root": "../checkpoint", "outputs": {"model.onnx": 0}}
    (source / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "surgery", str(source / "model.onnx"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert read_manifest(out)["weights_root"] == "."
    assert [path.name for path in checkpoint.iterdir()] == ["blobs"]
    found = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, case.feeds)[0]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()  # at its usual level it rounds x to 8 bits


def test_shapes_reach_through_ops_that_onnx_does_not_know():
    bare = weightless.load("genai/llama-int4-asymmetric")
    del bare.graph.value_info[:]
    declare_shapes(bare)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in bare.graph.value_info}
    attention = [node for node in bare.graph.node if node.op_type == "GroupQueryAttention"]
    assert [shapes[node.input[0]][2].dim_value for node in attention] == [256, 256]
    assert [shapes[node.output[0]][2].dim_value for node in attention] == [128, 128]


def test_a_head_size_left_open_is_written_where_the_graph_tells_it():
    model = grouped(Case(), packed=True)
    model.graph.value_info.append(helper.make_tensor_value_info("logits", FLOAT, ["batch", "sequence", HEADS * DIM]))
    del model.graph.output[0]
    write_head_sizes(model)
    values = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)}
    assert [values[name][3].dim_value for name in ("past_key", "past_value", "present_key", "present_value")] == [DIM] * 4

"""Graphs of one com.microsoft op each, and how both of its forms run on the same inputs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import Plan, make_plan
from suture.surgery.runner import run_plan

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
    plan = Plan(make_plan(SurgeryOptions(cache="growing")).portable[:1], ())
    graph, _, report = run_plan(files.read(folder / "source.onnx"), plan)
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


def tables(case: Case, width: int, dtype: int = FLOAT, longest: int = 16) -> list[str]:
    angles = np.arange(longest)[:, None] * 0.7 ** np.arange(width)
    return [case.weight(name, f(angles).astype(DTYPES[dtype])) for name, f in (("cos", np.cos), ("sin", np.sin))]


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

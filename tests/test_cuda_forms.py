"""Forms that onnxruntime's CUDA provider has kernels for, by the table made on a GPU, and TensorRT's own forms of them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.core import cuda_kernels
from suture.core.network.compare import difference
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import describe
from suture.core.network.runner import to_numpy
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.reports import cuda
from suture.surgery.runner import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS, GROUPS = 8, 4
IMAGE = (2, CHANNELS, 3, 5)
PARAMETERS = {"w": np.linspace(0.5, 2, CHANNELS), "b": np.linspace(-1, 1, CHANNELS)}
OVER = {name: values.reshape(-1, 1, 1) for name, values in PARAMETERS.items()}
NEUTRAL = {"ones": np.ones(GROUPS), "zeros": np.zeros(GROUPS)}
GROUPED = {"grouped": np.array([0, GROUPS, -1]), "whole": np.array(IMAGE)}
BY_INSTANCE = (
    "g = Reshape(x, grouped) i = InstanceNormalization<epsilon = 1e-6>(g, ones, zeros) r = Reshape(i, whole) m = Mul(r, w) "
    "y = Add(m, b)"
)
ANY_SIZE = "s = Shape(x) " + BY_INSTANCE.replace("whole", "s")
NORMS = {  # the opset, x, the nodes, what they read, GroupNormalization of the lowered graph
    "as torch writes it": (18, IMAGE, BY_INSTANCE, OVER | NEUTRAL | GROUPED, 1),
    "any height and width": (18, ("n", CHANNELS, "h", "w"), ANY_SIZE, OVER | NEUTRAL | GROUPED, 1),
    "without scale and bias": (18, IMAGE, BY_INSTANCE.split("m =")[0].replace("r =", "y ="), NEUTRAL | GROUPED, 1),
    "its own operator": (21, IMAGE, "y = GroupNormalization<num_groups = 4>(x, w, b)", PARAMETERS, 1),
    "of opset 18": (18, IMAGE, "y = GroupNormalization<num_groups = 4>(x, ones, zeros)", NEUTRAL, 1),
    "of one group": (21, IMAGE, "y = GroupNormalization<num_groups = 1>(x, w, b)", PARAMETERS, 0),
    "instances": (17, IMAGE, "y = InstanceNormalization(x, w, b)", PARAMETERS, 1),
    "instances of volumes": (17, ("n", CHANNELS, "d", 3, 2), "y = InstanceNormalization(x, w, b)", PARAMETERS, 1),
    "instances of rows": (17, (2, CHANNELS, 9), "y = InstanceNormalization(x, w, b)", PARAMETERS, 0),
}


def model_of(opset: int, shape: tuple, nodes: str, weights: dict[str, np.ndarray], dtype: type) -> onnx.ModelProto:
    name = {np.float32: "float", np.float16: "float16"}[dtype]
    sizes = ", ".join(map(str, shape))
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({name}[{sizes}] x) => ({name}[{sizes}] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for each, values in weights.items():
        model.graph.initializer.append(
            numpy_helper.from_array(values if values.dtype.kind == "i" else values.astype(dtype), each)
        )
    return model


def operated(model: onnx.ModelProto, tmp_path: Path):
    """The portable and the lowered model, and the report."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    portable, lowered, report = run_plan(files.read(path), make_plan(SurgeryOptions()))
    return files.to_model(portable), files.to_model(lowered), report


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def evaluated(lowered: onnx.ModelProto, tmp_path: Path, **inputs: np.ndarray) -> np.ndarray:
    network = describe(lowered.SerializeToString(), tmp_path / "model.onnx", tmp_path)
    return to_numpy(Evaluator(network, "cpu")(inputs)["y"])


def ops(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_groups(name, dtype, tmp_path):
    opset, shape, nodes, weights, whole = NORMS[name]
    model = model_of(opset, shape, nodes, weights, dtype)
    portable, lowered, _ = operated(model, tmp_path)
    assert ops(portable)["LayerNormalization"] == 1
    assert not ops(portable).keys() & {"InstanceNormalization", "GroupNormalization"}
    assert ops(lowered)["GroupNormalization"] == whole
    assert ops(lowered)["LayerNormalization"] == 1 - whole
    x = (np.random.default_rng(0).normal(3, 2, [size if isinstance(size, int) else 4 for size in shape])).astype(dtype)
    expected, tolerance = run(model, x=x), 1e-5 if dtype is np.float32 else 4e-3
    assert not difference("y", expected, run(portable, x=x)).beyond(tolerance)
    assert not difference("y", expected, evaluated(lowered, tmp_path, x=x)).beyond(tolerance)


def test_rows_that_are_normalised_together_stay(tmp_path):
    """Groups that go over the rows of a batch are not GroupNormalization."""
    nodes = BY_INSTANCE.replace("grouped", "joined")
    model = model_of(18, IMAGE, nodes, OVER | {"joined": np.array([1, GROUPS, -1])} | NEUTRAL | GROUPED, np.float32)
    portable, lowered, report = operated(model, tmp_path)
    assert not ops(lowered)["GroupNormalization"]
    assert "it normalises over rows, too" in str([each.near_misses for each in report.passes])
    x = np.random.default_rng(0).normal(3, 2, IMAGE).astype(np.float32)
    assert not difference("y", run(model, x=x), evaluated(lowered, tmp_path, x=x)).beyond(1e-5)
    assert not difference("y", run(model, x=x), run(portable, x=x)).beyond(1e-5)


def attention(head_dim: int, dtype: int, kv_heads: int = 2, rank: int = 4, **attrs) -> onnx.ModelProto:
    def shape(heads: int, length: str) -> list:
        return ["b", heads, length, head_dim] if rank == 4 else ["b", length, heads * head_dim]

    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attrs)
    inputs = [helper.make_tensor_value_info(name, dtype, shape(heads, length)) for name, heads, length in
              (("q", 4, "s"), ("k", kv_heads, "t"), ("v", kv_heads, "t"))]  # fmt: skip
    output = helper.make_tensor_value_info("y", dtype, shape(4, "s"))
    graph = helper.make_graph([node], "g", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "settings", "masks"),
    [
        (160, TensorProto.FLOAT16, {}, 1),
        (160, TensorProto.FLOAT16, {"kv_heads": 4}, 1),
        (200, TensorProto.FLOAT16, {"scale": 0.3}, 1),
        (160, TensorProto.FLOAT16, {"rank": 3, "q_num_heads": 4, "kv_num_heads": 2}, 1),
        (160, TensorProto.FLOAT16, {"is_causal": 1}, 0),
        (128, TensorProto.FLOAT16, {}, 0),
        (160, TensorProto.FLOAT, {}, 0),
    ],
)
def test_heads_that_flash_attention_gets_wrong(head_dim, dtype, settings, masks, tmp_path):
    model = attention(head_dim, dtype, **settings)
    portable, lowered, report = operated(model, tmp_path)
    assert [bool(node.input[3:]) for node in portable.graph.node if node.op_type == "Attention"] == [bool(masks)]
    assert not [note for note in report.notes if "may be wrong" in note]
    assert ops(lowered)["TRT_Attention"] == 1
    assert "ConstantOfShape" not in ops(lowered) or settings.get("is_causal")
    half = helper.tensor_dtype_to_np_dtype(dtype)
    draw = np.random.default_rng(head_dim)
    inputs = {value.name: draw.normal(0, 1, [{"b": 2, "s": 3, "t": 5}.get(dim.dim_param, dim.dim_value)
              for dim in value.type.tensor_type.shape.dim]).astype(half) for value in model.graph.input}  # fmt: skip
    if settings.get("is_causal"):
        inputs["q"] = inputs["q"][:, :, :3]
        inputs |= {name: inputs[name][:, :, :3] for name in "kv"}
    expected, tolerance = run(model, **inputs), 1e-5 if dtype == TensorProto.FLOAT else 4e-3
    assert not difference("y", expected, run(portable, **inputs)).beyond(tolerance)
    assert not difference("y", expected, evaluated(lowered, tmp_path, **inputs)).beyond(tolerance)


def test_what_has_no_kernel_is_said(tmp_path):
    """MaxPool has one before opset 22 and none since: on CUDA it runs on the CPU."""
    model = model_of(13, IMAGE, "p = MaxPool<kernel_shape = [1, 1]>(x) y = Neg(p)", {}, np.float32)
    _, _, report = operated(model, tmp_path)
    (note,) = report.notes
    assert note.startswith("on CUDA MaxPool runs on the CPU (1 node)")
    assert note.endswith("in float32 at opset 24, though it has one before opset 22")


def test_the_table_is_of_the_opset_that_surgery_writes():
    assert cuda_kernels.table()["opset"] == cuda.OPSET == 24
    assert cuda_kernels.has_kernel("InstanceNormalization", 21, TensorProto.FLOAT16) is True
    assert cuda_kernels.has_kernel("InstanceNormalization", 22, TensorProto.FLOAT16) is False
    assert cuda_kernels.has_kernel("NoSuchOperator", 24, TensorProto.FLOAT) is None
    for op in (
        "Attention",
        "RMSNormalization",
        "LayerNormalization",
        "RotaryEmbedding",
        "Gelu",
        "Swish",
        "Gemm",
        "TensorScatter",
    ):
        assert cuda_kernels.has_kernel(op, 24, TensorProto.FLOAT16), op  # what surgery writes
    assert json.loads(cuda_kernels.TABLE.read_text())["device"]

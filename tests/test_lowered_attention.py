"""Attention as TensorRT has it: each form against onnxruntime, and the network that TensorRT's parser makes of it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from suture.core.network.compare import difference
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import describe
from suture.core.network.runner import to_numpy
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
CASES = Path(__file__).parent / "graphs" / "cases"
SIZES = {"b": 2, "s": 5, "t": 7, "p": 3, "u": 8, "batch": 2, "seq": 6}
ALIKE = "float[b, 4, s, 16] hq, float[b, 4, t, 16] hk, float[b, 4, t, 16] hv"
GROUPED = "float[b, 4, s, 16] hq, float[b, 2, t, 16] hk, float[b, 2, t, 16] hv"
PAST = "float[b, 4, s, 16] hq, float[b, 2, s, 16] hk, float[b, 2, s, 16] hv, float[b, 2, p, 16] pk, float[b, 2, p, 16] pv"
GROWN = ", float[b, 2, u, 16] nk, float[b, 2, u, 16] nv"
ROWS = "float[b, s, 64] hq, float[b, t, 32] hk, float[b, t, 32] hv"
CONTEXT, CONTEXT_ROWS = "float[b, 4, s, 16] y", "float[b, s, 64] y"
FUSED, PRODUCTS = {"TRT_Attention": 1}, {"MatMul": 2, "Softmax": 1}
CAPPED = PRODUCTS | {"Tanh": 1}
HALF = {"half": True}

FORMS = {  # inputs, outputs, the node, what it becomes
    "causal": (ALIKE, CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv)", FUSED),
    "causal, grouped": (GROUPED, CONTEXT, "y = Attention<is_causal = 1, scale = 0.3>(hq, hk, hv)", FUSED),
    "causal, bool mask": (GROUPED + ", bool[b, 1, s, t] m", CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv, m)", FUSED),
    "causal, bool mask of two axes": (GROUPED + ", bool[s, t] m", CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv, m)", FUSED),
    "causal, bias": (GROUPED + ", float[b, 4, s, t] m", CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv, m)", FUSED),
    "bias of two axes": (GROUPED + ", float[s, t] m", CONTEXT, "y = Attention(hq, hk, hv, m)", FUSED),
    "bias of three axes": (GROUPED + ", float[4, s, t] m", CONTEXT, "y = Attention(hq, hk, hv, m)", FUSED),
    "valid length": (GROUPED + ", int64[b] n", CONTEXT, "y = Attention(hq, hk, hv, , , , n)", FUSED),
    "valid length, causal": (GROUPED + ", int64[b] n", CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv, , , , n)", FUSED),
    "softcap": (GROUPED, CONTEXT, "y = Attention<softcap = 2.0>(hq, hk, hv)", CAPPED),
    "softcap, all heads' bias, causal": (
        GROUPED + ", float[b, 4, s, t] m",
        CONTEXT,
        "y = Attention<softcap = 2.0, is_causal = 1, scale = 1.5>(hq, hk, hv, m)",
        CAPPED,
    ),
    "softcap, bias": (GROUPED + ", float[b, 1, s, t] m", CONTEXT, "y = Attention<softcap = 2.0>(hq, hk, hv, m)", CAPPED),
    "softcap, heads alike, mask": (
        ALIKE + ", bool[b, 1, s, t] m",
        CONTEXT,
        "y = Attention<softcap = 2.0>(hq, hk, hv, m)",
        CAPPED,
    ),
    "values of another size": (
        "float[b, 4, s, 24] hq, float[b, 2, t, 24] hk, float[b, 2, t, 16] hv",
        CONTEXT,
        "y = Attention<is_causal = 1>(hq, hk, hv)",
        PRODUCTS,
    ),
    "rank 3": (ROWS, CONTEXT_ROWS, "y = Attention<q_num_heads = 4, kv_num_heads = 2>(hq, hk, hv)", FUSED),
    "rank 3, causal, softcap": (
        ROWS,
        CONTEXT_ROWS,
        "y = Attention<q_num_heads = 4, kv_num_heads = 2, softcap = 3.0, is_causal = 1>(hq, hk, hv)",
        CAPPED,
    ),
    "rank 3, values of another size": (
        "float[b, s, 96] hq, float[b, t, 48] hk, float[b, t, 32] hv",
        CONTEXT_ROWS,
        "y = Attention<q_num_heads = 4, kv_num_heads = 2>(hq, hk, hv)",
        PRODUCTS,
    ),
    "past, causal": (PAST, CONTEXT + GROWN, "y, nk, nv = Attention<is_causal = 1>(hq, hk, hv, , pk, pv)", FUSED | {"Concat": 2}),
    "past, mask": (
        PAST + ", bool[s, u] m",
        CONTEXT + GROWN,
        "y, nk, nv = Attention(hq, hk, hv, m, pk, pv)",
        FUSED | {"Concat": 2},
    ),
    "past, rank 3": (
        "float[b, s, 64] hq, float[b, s, 32] hk, float[b, s, 32] hv, float[b, 2, p, 16] pk, float[b, 2, p, 16] pv",
        CONTEXT_ROWS + GROWN,
        "y, nk, nv = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(hq, hk, hv, , pk, pv)",
        FUSED | {"Concat": 2},
    ),
    "half, causal": (GROUPED, CONTEXT, "y = Attention<is_causal = 1>(hq, hk, hv)", FUSED, HALF),
    "half, softcap": (GROUPED, CONTEXT, "y = Attention<is_causal = 1, softcap = 2.0>(hq, hk, hv)", CAPPED, HALF),
    "half, float32 softmax": (ALIKE, CONTEXT, "y = Attention<softmax_precision = 1>(hq, hk, hv)", PRODUCTS, HALF),
}  # fmt: skip


def model_of(name: str) -> onnx.ModelProto:
    inputs, outputs, node, _, *half = FORMS[name]
    if half:
        inputs, outputs = inputs.replace("float", "float16"), outputs.replace("float", "float16")
    return onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 24]> g ({inputs}) => ({outputs}) {{ {node} }}')


def noise(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Of twice the normal deviation, so that the softmax is far from even; masks leave each row its first slot."""
    random, feeds = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = [dim.dim_value or SIZES[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype == np.bool_:
            feeds[value.name] = random.random(shape) > 0.3
            feeds[value.name][..., 0] = True
        elif value.name == "n":
            feeds[value.name] = np.array([5, 7])
        elif dtype.kind == "i":
            feeds[value.name] = random.integers(0, 100, shape)
        else:
            feeds[value.name] = (2 * random.standard_normal(shape)).astype(dtype)
    return feeds


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds)))


def lowered_ops(path: Path, folder: Path, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> Counter:
    """The lowered graph's operators, once source, portable graph and TensorRT's network of the lowered one agree."""
    portable, lowered, _ = run_plan(files.read(path), make_plan(SurgeryOptions(cache="growing", capacity=32)))
    model, target = files.to_model(lowered), folder / "model.trt.onnx"
    onnx.save(files.without_shapes(model), target)
    source, ours = run(onnx.load(path), feeds), run(files.to_model(portable), feeds)
    assert source.keys() == ours.keys()
    network = Evaluator(describe(target.read_bytes(), target, folder), "cpu")(feeds)
    for name, expected in source.items():
        for found in (ours[name], to_numpy(network[name])):
            error = difference(name, expected, found)
            assert not error.beyond(tolerance), error
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    model = model_of(form)
    onnx.save(model, tmp_path / "source.onnx")
    ops = lowered_ops(tmp_path / "source.onnx", tmp_path, noise(model), 5e-3 if form.startswith("half") else 1e-5)
    wanted = FORMS[form][3]
    assert {op: ops[op] for op in (*wanted, "Attention")} == wanted | {"Attention": 0}
    assert ops["TRT_Attention"] + ops["Softmax"] == 1


@pytest.mark.parametrize("case", ["causal_no_cache_op23", "attention_3d_encoder"])
def test_graphs_without_a_cache(case, tmp_path):
    path = CASES / f"{case}.onnx"
    ops = lowered_ops(path, tmp_path, noise(onnx.load(path)))
    assert (ops["TRT_Attention"], ops["Attention"]) == (1, 0)


def test_a_causal_graph_without_a_cache_is_built(tmp_path):
    _, lowered, _ = run_plan(files.read(CASES / "causal_no_cache_op23.onnx"), make_plan(SurgeryOptions(capacity=32)))
    files.write(lowered, tmp_path / "model.trt.onnx")
    command = [sys.executable, "-m", "suture.build", tmp_path / "model.trt.onnx", "--out", tmp_path / "build"]
    built = subprocess.run([*command, "--compute-capability", "8.9"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


def test_layers_that_hide_the_same_share_a_mask(tmp_path):
    text = f"""<ir_version: 11, opset_import: ["": 24]> g ({ALIKE}, bool[b, 1, s, t] m) => (float[b, 4, s, 16] y) {{
        a = Attention<is_causal = 1>(hq, hk, hv)  c = Attention<is_causal = 1>(a, hk, hv)
        d = Attention<is_causal = 1>(c, hk, hv, m)  y = Attention<is_causal = 1>(d, hk, hv, m) }}"""
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / "source.onnx")
    ops = lowered_ops(tmp_path / "source.onnx", tmp_path, noise(model))
    assert (ops["TRT_Attention"], ops["LessOrEqual"], ops["Where"]) == (4, 1, 2)


@pytest.mark.parametrize(
    ("outputs", "node", "reason"),
    [
        (", float[b, 4, s, t] qk", "y, , , qk = Attention(hq, hk, hv)", "its output qk_matmul_output is not accounted for"),
    ],
)
def test_what_is_not_known_stays_and_is_named(outputs, node, reason, tmp_path):
    text = f'<ir_version: 11, opset_import: ["": 24]> g ({ALIKE}) => ({CONTEXT}{outputs}) {{ {node} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "source.onnx")
    _, lowered, report = run_plan(files.read(tmp_path / "source.onnx"), make_plan(SurgeryOptions(cache="growing", capacity=32)))
    (attention,) = [node for node in lowered.gs.nodes if node.op == "Attention"]
    assert attention.attrs == {}
    lines = [line for line in report.lines() if reason in line]
    assert [line.split(":")[0] for line in lines] == ["not lowered", "not fused"]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_softcap_over_a_cache(cache, tmp_path):
    """Static: the valid length and is_causal become the mask that every static cache has."""
    path = CASES / "softcap.onnx"
    portable, lowered, _ = run_plan(files.read(path), make_plan(SurgeryOptions(cache=cache, capacity=32)))
    wanted = CAPPED | {"TensorScatter": 2 if cache == "static" else 0}
    ops = Counter(node.op for node in lowered.gs.nodes)
    assert {op: ops[op] for op in wanted} == wanted
    assert ops["Attention"] == ops["TRT_Attention"] == 0
    assert Counter(node.op for node in portable.gs.nodes)["Attention"] == 1
    target = tmp_path / "model.trt.onnx"
    files.write(lowered, target)
    network, random = Evaluator(describe(target.read_bytes(), target, tmp_path), "cpu"), np.random.default_rng(3)
    for batch, steps, past in ((2, 6, 0), (2, 3, 5), (3, 1, 9)):
        pasts = [random.standard_normal((batch, 2, past, 16)).astype(np.float32) for _ in range(2)]
        names = [f"past_key_values.0.{role}" for role in ("key", "value")]
        feeds = {"input_ids": random.integers(0, 160, (batch, steps))} | dict(zip(names, pasts))
        expected = run(onnx.load(path), feeds)["logits"]
        if cache == "static":
            rest = random.standard_normal((batch, 2, 32 - past, 16)).astype(np.float32)
            feeds |= {name: np.concatenate([feeds[name], rest], axis=2) for name in names}
            feeds["write_indices"] = np.full(batch, past)
        for found in (run(files.to_model(portable), feeds), {"logits": to_numpy(network(feeds)["logits"])}):
            error = difference("logits", expected, found["logits"])
            assert not error.beyond(1e-5), (steps, past, error)

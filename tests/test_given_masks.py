"""Caches whose mask somebody else makes, or that an old GPT-2 keeps: static like the rest, and equal step by step."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import suture
from suture.core.errors import UserError
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import parse
from suture.core.network.runner import to_numpy
from suture.core.signature import find_signature
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from suture.surgery.verification.verify import State, compare
from tests.graphs import weightless
from tests.test_foreign_graphs import run

SLOTS = 24
STEPS = ((0, 5), (5, 1), (6, 3))  # slots that are full, tokens
OLD_GPT2 = """<ir_version: 10, opset_import: ["": 14]>
g (int64[B, S] input_ids, int64[B, T] attention_mask, float[B, 2, P, 8] past_k, float[B, 2, P, 8] past_v)
    => (float[B, S, 32] logits, float[B, 2, T, 8] present_k, float[B, 2, T, 8] present_v)
<float low = {-10000}, float one = {1}, float root = {2.828427}, int64[4] heads = {0, 0, 2, 8}, int64[3] rows = {0, 0, 16},
    int64[1] first = {0}, int64[1] second = {1}, int64[1] third = {2}, int64[1] fourth = {3}, int64 tokens = {1}, int64 slots = {2}> {
    x = Gather(table, input_ids)
    q0 = MatMul(x, wq)
    k0 = MatMul(x, wk)
    v0 = MatMul(x, wv)
    q1 = Reshape(q0, heads)
    k1 = Reshape(k0, heads)
    v1 = Reshape(v0, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q1)
    v = Transpose<perm = [0, 2, 1, 3]>(v1)
    past_t = Transpose<perm = [0, 1, 3, 2]>(past_k)
    k = Transpose<perm = [0, 2, 3, 1]>(k1)
    keys = Concat<axis = -1>(past_t, k)
    present_k = Transpose<perm = [0, 1, 3, 2]>(keys)
    present_v = Concat<axis = 2>(past_v, v)
    sizes = Shape(present_v)
    total = Gather(sizes, slots)
    end = Unsqueeze(total, first)
    given = Shape(input_ids)
    steps = Gather(given, tokens)
    count = Unsqueeze(steps, first)
    start = Sub(end, count)
    seen_rows = Slice(table_of_causes, start, end, third)
    seen = Slice(seen_rows, first, end, fourth)
    m0 = Unsqueeze(attention_mask, second)
    m1 = Unsqueeze(m0, third)
    m2 = Cast<to = 1>(m1)
    m3 = Sub(one, m2)
    padding = Mul(m3, low)
    scores = MatMul(q, keys)
    scaled = Div(scores, root)
    causal = Where(seen, scaled, low)
    masked = Add(causal, padding)
    w = Softmax<axis = -1>(masked)
    y0 = MatMul(w, present_v)
    y1 = Transpose<perm = [0, 2, 1, 3]>(y0)
    y2 = Reshape(y1, rows)
    y3 = Add(x, y2)
    logits = MatMul(y3, head)
}"""


def old_gpt2() -> onnx.ModelProto:
    model, rng = onnx.parser.parse_model(OLD_GPT2), np.random.default_rng(0)
    for name, shape in {"table": (32, 16), "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "head": (16, 32)}.items():
        weight = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    model.graph.initializer.append(numpy_helper.from_array(np.tri(64, dtype=bool)[None, None], "table_of_causes"))
    return model


def scattered(dtype: type) -> onnx.ModelProto:
    """A decoder over caches of SLOTS that a scatter writes, its mask [B, 1, S, SLOTS] an input: added, or what is shown."""
    model = weightless.load("static/qwen2-dynamo-18-float32")
    sums = [node for node in model.graph.node for each in model.graph.node
            if each.op_type == "Softmax" and each.input[0] in node.output]  # fmt: skip
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", onnx_type, ["s10", 1, "s70", SLOTS]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1e9), "hidden"))
    for node in sums:
        scores, (result,) = node.input[0], node.output
        if dtype is bool:
            node.CopyFrom(helper.make_node("Where", ["attention_mask", scores, "hidden"], [result], node.name))
        else:
            node.input[1] = "attention_mask"
    return model


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_a_mask_over_slots_stays_an_input_where_scatters_become_cache_updates(dtype, tmp_path):
    source = scattered(dtype)
    done = operate(source, SurgeryOptions(capacity=SLOTS))
    ops = [node.op_type for node in done.portable.graph.node]
    assert (ops.count("Attention"), ops.count("TensorScatter"), ops.count("ScatterND")) == (2, 4, 0)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in done.portable.graph.input}
    assert shapes["attention_mask"] == [0, 1, 0, SLOTS]
    onnx.save(done.lowered, tmp_path / "model.onnx")
    evaluate = Evaluator(parse(tmp_path / "model.onnx"), "cpu")
    rng, names = np.random.default_rng(0), [value.name for value in source.graph.input if value.name.startswith("past_")][1:]
    caches = [rng.standard_normal((2, 2, SLOTS, 16)).astype(np.float32) for _ in names]
    pasts = [value.name for value in done.portable.graph.input if value.name.startswith("past_key_values")]
    for full, tokens in STEPS:
        visible = np.arange(SLOTS) <= full + np.arange(tokens)[:, None]
        step = {
            "input_ids": rng.integers(0, 128, (2, tokens)),
            "position_ids": np.tile(full + np.arange(tokens), (2, 1)),
            "attention_mask": np.broadcast_to(
                visible if dtype is bool else np.where(visible, 0, -1e9), (2, 1, tokens, SLOTS)
            ).astype(dtype),
        }
        logits, *caches_after = run(source, step | dict(zip(names, caches)) | {"past_length": np.array(full)}).values()
        given = step | dict(zip(pasts, caches)) | {"write_indices": np.full(2, full)}
        for found in (run(done.portable, given), {name: to_numpy(value) for name, value in evaluate(given).items()}):
            assert np.abs(found["logits"] - logits).max() < 1e-5 * np.abs(logits).max()
            for past, after in zip(pasts, caches_after, strict=True):
                assert np.abs(found[past.replace("past_key_values", "present")] - after).max() < 1e-5
        caches = caches_after


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_a_decoding_step_of_one_row_becomes_cache_updates_too(dtype):
    """As graphs are traced for a device: one token of one sequence, nothing open."""
    source = scattered(dtype)
    for value in (*source.graph.input, *source.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("s10", "s70"):
                dim.dim_value = 1
    del source.graph.value_info[:]
    done = suture.operate(source, capacity=SLOTS)
    ops = [node.op_type for node in done.portable.graph.node]
    assert (ops.count("Attention"), ops.count("TensorScatter"), ops.count("ScatterND")) == (2, 4, 0)
    assert done.report.proof["status"] == "passed"


def test_a_mask_of_other_slots_than_the_cache_is_refused():
    """Its scores would be added to a mask of another size."""
    source = scattered(np.float32)
    source.graph.input[-1].type.tensor_type.shape.dim[3].dim_value = SLOTS + 1
    with pytest.raises(UserError, match="Incompatible dimensions"):
        operate(source, SurgeryOptions(capacity=SLOTS))


def test_an_old_gpt2_is_static(tmp_path):
    """Its keys transposed before they are joined, the future hidden by Where, padding by Add."""
    source = old_gpt2()
    done = operate(source, SurgeryOptions(capacity=32))
    ops = [node.op_type for node in done.portable.graph.node]
    assert (ops.count("Attention"), ops.count("TensorScatter"), ops.count("Softmax")) == (1, 2, 0)
    before, after = (State(model, find_signature(model), Path()) for model in (source, done.portable))
    assert compare("surgery", before, before, after) < 1e-5
    onnx.save(done.lowered, tmp_path / "model.onnx")
    evaluate = Evaluator(parse(tmp_path / "model.onnx"), "cpu")
    for feeds in make_feeds(done.portable):
        expected = run(done.portable, feeds.values)
        for name, values in evaluate(feeds.values).items():
            assert np.abs(to_numpy(values) - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()

"""onnxruntime's own norms, activations, products and attention in standard ops, each against onnxruntime's kernel."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from suture.core.signature import find_signature
from tests.contrib_cases import (
    BATCH,
    DIM,
    DTYPES,
    FLOAT,
    FLOAT16,
    HEADS,
    PAST,
    STEPS,
    Case,
    check,
    grouped,
    ops,
    refused,
    run,
    standard,
    tables,
)


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
    if unidirectional:
        of_one_input(model)
    found = check_rows(case, model, tmp_path, padded=padding and unidirectional)
    assert found["Attention"] == 1
    assert found["Concat"] >= (2 if past else 0)


def of_one_input(model: onnx.ModelProto) -> None:
    """Keys and values are computed from the queries' tokens, so that there are as many of both."""
    kept = [value for value in model.graph.input if value.name not in ("k", "v")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for number, name in enumerate("kv"):
        model.graph.initializer.append(numpy_helper.from_array(np.float32([0.5 + number]), f"{name}_factor"))
        model.graph.node.insert(0, helper.make_node("Mul", ["q", f"{name}_factor"], [name], f"/model/layers.0/part/{name}"))


@pytest.mark.parametrize("cached", [False, True])
def test_unidirectional_over_keys_that_are_not_the_queries_own(cached, tmp_path):
    """Of three queries over two keys the first see nothing, or not, as onnxruntime's provider has it."""
    case, keys = Case(), 2
    inputs = [case.x("q", BATCH, STEPS, HEADS * DIM)]
    shape = (BATCH, HEADS, keys, DIM) if cached else (BATCH, keys, HEADS * DIM)
    inputs += [case.feed(f"cross_{side}", case.normal(*shape)) for side in "kv"]
    assert "unidirectional" in refused(
        case.model("MultiHeadAttention", inputs, ["logits"], num_heads=HEADS, unidirectional=1), tmp_path
    )


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

"""What surgery does not support: refused with its reason, or left as it is and said, never half done."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.signature import find_signature
from suture.core.weights import load_graph
from suture.surgery import capacity
from suture.surgery.__main__ import main
from tests.decoding import decode, largest_error
from tests.graphs import weightless
from tests.test_import_contrib_graphs import at_full_accuracy, whole
from tests.test_surgery_families import FUSED, counts, llama, operated

QWEN = "torch213_torchscript_qwen2_op17_float32"


def add_constants(model: onnx.ModelProto, **arrays: np.ndarray) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items())


def with_experts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Layer 1's down projection becomes the better of two, token by token."""
    product = [node for node in model.graph.node if node.op_type == "MatMul" and "down_proj" in node.name][1]
    h, weight, y = product.input[0], product.input[1], product.output[0]
    sizes = next(tensor.dims for tensor in model.graph.initializer if tensor.name == weight)
    random = np.random.default_rng(0)
    expert, router = (random.normal(size=shape).astype(np.float32) for shape in (sizes, (sizes[0], 2)))
    add_constants(model, expert=expert, router=router, one=np.array([1]), zero=np.array(0))
    nodes = [
        helper.make_node("MatMul", [h, "router"], ["routed"]),
        helper.make_node("TopK", ["routed", "one"], ["best", "which"], axis=-1),
        helper.make_node("Equal", ["which", "zero"], ["first"]),
        helper.make_node("MatMul", [h, "expert"], ["other"]),
        helper.make_node("Where", ["first", "own", "other"], [y]),
    ]
    product.output[0] = "own"
    place = list(model.graph.node).index(product) + 1
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    return model


@pytest.mark.seconds
def test_a_mixture_of_experts_stays_and_is_said(tmp_path):
    source = with_experts(weightless.load(QWEN))
    portable, report = operated(source, tmp_path)
    assert counts(portable, (*FUSED, "TopK")) == llama | {"TopK": 1}
    assert [(each["op"], "mixture of experts" in each["reason"]) for each in report.unfused] == [("TopK", True)]
    assert largest_error(decode(source, alone=True), decode(portable, alone=False)) < 1e-4


@pytest.mark.parametrize("sizes", [[2, 2, "batch", 2, "past", 16], ["rows", "past", 16]])
def test_inputs_of_other_axes_are_no_caches_whatever_they_are_called(sizes):
    """All layers stacked into one tensor; heads and rows merged, as BLOOM's once were: they stay as they are."""
    model = weightless.load(QWEN)
    model.graph.input.append(helper.make_tensor_value_info("past_key_values", TensorProto.FLOAT, sizes))
    assert find_signature(model, need_caches=False).caches == find_signature(weightless.load(QWEN)).caches


@pytest.mark.parametrize("name", ["gpt2_mask-dynamo-18-float32", "opt-dynamo-18-float32", "gptj-torchscript-17-float32"])
@pytest.mark.sample(1)
@pytest.mark.seconds
def test_capacity_ends_where_positions_do(name, tmp_path, capsys):
    """96 positions learned, or tabled for a rotation; OPT's table begins with two rows for padding."""
    onnx.save(weightless.load(name), tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out")]) == 0
    assert "the cache has 96 slots, not 2,048" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    portable = load_graph(tmp_path / "out" / "model.onnx")
    assert find_signature(portable).capacity == 96
    with pytest.raises(UserError, match="knows 96 positions"):
        capacity.main([str(tmp_path / "out"), "--capacity", "97", "--out", str(tmp_path / "more")])
    capacity.main([str(tmp_path / "out"), "--capacity", "40", "--out", str(tmp_path / "less")])
    with pytest.raises(UserError, match="knows 96 positions"):
        capacity.main([str(tmp_path / "less"), "--capacity", "97", "--out", str(tmp_path / "more")])


@pytest.mark.seconds
def test_a_capacity_grows_no_further_than_positions_that_once_were_enough(tmp_path):
    onnx.save(weightless.load("gpt2_mask-dynamo-18-float32"), tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out"), "--capacity", "64"]) == 0
    with pytest.raises(UserError, match="knows 96 positions"):
        capacity.main([str(tmp_path / "out"), "--capacity", "97", "--out", str(tmp_path / "more")])
    capacity.main([str(tmp_path / "out"), "--capacity", "96", "--out", str(tmp_path / "more")])


def test_a_capacity_within_the_positions_is_no_news(tmp_path):
    _, report = operated(weightless.load("gpt2_mask-dynamo-18-float32"), tmp_path)
    assert report.notes == []


def test_rotary_tables_that_an_if_chooses(tmp_path):
    """Phi-3's long form: another table once all tokens are more than it was trained on. The choice goes by the length of
    the mask, which a static cache does not have, so the cache stays as it is, and the report says why."""
    source = at_full_accuracy(weightless.load("genai/phi-float32"))
    attentions = [node for node in source.graph.node if node.op_type == "GroupQueryAttention"]
    tables = {"cos": attentions[0].input[7], "sin": attentions[0].input[8]}
    values = {tensor.name: tensor for tensor in source.graph.initializer}
    long = {name: numpy_helper.to_array(values[table])[::-1].copy() for name, table in tables.items()}
    add_constants(source, mask_axis=np.array(1), trained=np.array(8), **{f"{name}_long": each for name, each in long.items()})
    of = helper.make_tensor_value_info
    branches = {}
    for branch, ending in (("then_branch", "_long"), ("else_branch", "")):
        chosen = [f"{name}_long" if ending else tables[name] for name in tables]
        nodes = [helper.make_node("Identity", [each], [f"{name}_{branch}"]) for name, each in zip(tables, chosen)]
        outputs = [of(f"{name}_{branch}", TensorProto.FLOAT, long[name].shape) for name in tables]
        branches[branch] = helper.make_graph(nodes, branch, [], outputs)
    for node in attentions:
        node.input[7:9] = ["cos_chosen", "sin_chosen"]
    for node in reversed([
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "mask_axis"], ["all_tokens"]),
        helper.make_node("Greater", ["all_tokens", "trained"], ["is_long"]),
        helper.make_node("If", ["is_long"], ["cos_chosen", "sin_chosen"], **branches),
    ]):  # fmt: skip
        source.graph.node.insert(0, node)
    portable, unfused = whole(source, tmp_path, "static")
    assert counts(portable, ("If", "TensorScatter", "Attention")) == {"If": 1, "Attention": 2}
    assert any("how long the cache is, or its mask, is used elsewhere" in each["reason"] for each in unfused)
    assert largest_error(decode(source, alone=True), decode(portable, alone=True)) < 1e-4

"""Forms of caches, masks and signatures that no exporter at hand writes, made from graphs that it does."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.signature import find_signature
from suture.surgery.__main__ import main
from tests.decoding import decode, largest_error
from tests.graphs import weightless
from tests.test_surgery_families import FUSED, counts, llama, operated

GROWING = "torch213_dynamo_qwen2_op18_float32"


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


@pytest.mark.parametrize("by_itself", [False, True])
def test_attention_with_a_cache_of_its_own(tmp_path, by_itself):
    """Attention(q, k, v, mask, past_key, past_value) -> y, present_key, present_value, with and without is_causal."""
    source = weightless.load(GROWING)
    model, _ = operated(source, tmp_path, cache="growing")
    made = producers(model)
    for attention in [node for node in model.graph.node if node.op_type == "Attention"]:
        presents, grown = attention.input[1:3], [made[name] for name in attention.input[1:3]]
        attention.input[1:3] = [concat.input[1] for concat in grown]
        attention.input.extend(concat.input[0] for concat in grown)
        attention.output.extend(presents)
        for concat in grown:
            model.graph.node.remove(concat)
        if by_itself:
            attention.input[3] = ""
            attention.attribute.append(helper.make_attribute("is_causal", 1))
    portable, _ = operated(model, tmp_path)
    assert counts(portable, FUSED) == llama
    assert largest_error(decode(source, alone=True), decode(portable, alone=False)) < 1e-4


def test_a_mask_that_is_an_input_stays(tmp_path):
    """float [B, 1, S, T] growing becomes [B, 1, S, capacity]: what is hidden is the caller's business."""
    model, _ = operated(weightless.load(GROWING), tmp_path, cache="growing")
    masks = {node.input[3] for node in model.graph.node if node.op_type == "Attention"}
    assert len(masks) == 1
    bias = helper.make_tensor_value_info("score_mask", TensorProto.FLOAT, ["batch", 1, "sequence", "total"])
    for node in model.graph.node:
        node.input[:] = ["score_mask" if name in masks else name for name in node.input]
    del model.graph.input[[value.name for value in model.graph.input].index("attention_mask")]
    model.graph.input.append(bias)
    portable, _ = operated(gs.export_onnx(gs.import_onnx(model).cleanup()), tmp_path)
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim] for value in portable.graph.input
    }
    assert shapes["attention_mask"] == ["batch", 1, "sequence", 32]
    assert counts(portable, FUSED) == llama
    attentions = [node for node in portable.graph.node if node.op_type == "Attention"]
    assert all(node.input[3] == "attention_mask" and len(node.input) == 4 for node in attentions)


def test_a_window_of_the_cache_is_refused(tmp_path):
    """present = the last 8 slots: no slot keeps its place, so nothing becomes static, and the report says why."""
    source = weightless.load(GROWING)
    for name in [value.name for value in source.graph.output if value.name.startswith("present")]:
        node = producers(source)[name]
        for other in source.graph.node:
            other.input[:] = [f"{name}_all" if used == name else used for used in other.input]
        node.output[:] = [f"{name}_all"]
        for end, value in (("start", -8), ("end", 1 << 40), ("axis", 2)):
            source.graph.initializer.append(numpy_helper.from_array(np.array([value]), f"{name}_{end}"))
        source.graph.node.append(
            helper.make_node("Slice", [f"{name}_all", *(f"{name}_{e}" for e in ("start", "end", "axis"))], [name])
        )
    portable, report = operated(source, tmp_path)
    assert counts(portable, ("TensorScatter", "Attention")) == {"Attention": 2}
    reasons = [miss.reason for each in report.passes if each.name == "static_cache" for miss in each.near_misses]
    assert any("the output present_k_0 is a window of the grown cache" in reason for reason in reasons)


def test_an_unknown_mask_is_not_guessed_away(tmp_path):
    """Causality with every fifth slot hidden."""
    source = weightless.load(GROWING)
    node = next(node for node in source.graph.node if node.op_type == "LessOrEqual")
    slots, visible = node.input[0], node.output[0]
    node.output[0] = "causal"
    constants = {"five": np.array(5), "four": np.array(4)}
    source.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    place = list(source.graph.node).index(node) + 1
    for fresh in (helper.make_node("And", ["causal", "odd"], [visible]), helper.make_node("Not", ["fifth"], ["odd"]),
                  helper.make_node("Equal", ["rest", "four"], ["fifth"]), helper.make_node("Mod", [slots, "five"], ["rest"])):  # fmt: skip
        source.graph.node.insert(place, fresh)
    portable, report = operated(source, tmp_path)
    assert counts(portable, ("TensorScatter", "Attention")) == {"Attention": 2}
    reasons = [miss.reason for each in report.passes if each.name == "static_cache" for miss in each.near_misses]
    assert "the mask is neither causal nor padding nor a window" in reasons
    assert largest_error(decode(source, alone=True), decode(portable, alone=True)) < 1e-4


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return model


def test_caches_are_paired_by_what_joins_them(tmp_path):
    """Names that say nothing: layers and roles go by the order of the inputs."""
    source = weightless.load(GROWING)
    kinds = [f"{kind}_{layer}" for layer in range(2) for kind in "kv"]
    names = {f"past_{kind}": f"cache_{i}" for i, kind in enumerate(kinds)}
    names |= {f"present_{kind}": f"output_{7 * i % 5}" for i, kind in enumerate(kinds)}
    portable, _ = operated(renamed(source, names), tmp_path)
    assert counts(portable, FUSED) == llama
    assert largest_error(decode(weightless.load(GROWING), alone=True), decode(portable, alone=False)) < 1e-4


def test_a_cache_without_its_output_is_named():
    source = weightless.load(GROWING)
    del source.graph.output[[value.name for value in source.graph.output].index("present_v_1")]
    with pytest.raises(UserError, match="past_v_1"):
        find_signature(source)


@pytest.mark.seconds
def test_inputs_whose_names_say_nothing(tmp_path, capsys):
    source = renamed(weightless.load(GROWING), {"input_ids": "a", "attention_mask": "b", "position_ids": "c", "logits": "d"})
    onnx.save(source, tmp_path / "model.onnx")
    arguments = [str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out"), "--capacity", "32"]
    with pytest.raises(UserError, match="no logits output"):
        main(arguments)
    given = ["--name", "tokens=a", "--name", "mask=b", "--name", "positions=c", "--name", "logits=d"]
    assert main(arguments + given) == 0
    portable = onnx.load(tmp_path / "out" / "model.onnx")
    assert counts(portable, FUSED) == llama
    assert largest_error(decode(weightless.load(GROWING), alone=True), decode(portable, alone=False)) < 1e-4
    with pytest.raises(UserError, match=r"holds model.onnx, which surgery reads"):
        main([str(tmp_path / "model.onnx"), "--out", str(tmp_path), *given])
    for wrong, says in (("tokens=z", "has no input z"), ("colour=a", "no such role")):
        with pytest.raises(UserError, match=says):
            main([*arguments, "--name", wrong])
    with pytest.raises(SystemExit):
        main([*arguments, "--name", "a"])

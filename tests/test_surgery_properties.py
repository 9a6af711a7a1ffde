"""A graph that is not quite what a pass knows: whatever is disturbed, surgery's result computes what the graph computes.

A node is taken out, its operands are exchanged, or one of its constants is changed; then either the pass does not match
(and leaves the graph as it is, or says why it cannot go on), or what it writes takes the change over.
"""

import copy
import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from suture.core.errors import UserError
from tests.decoding import Steps, decode, largest_error
from tests.graphs import weightless
from tests.test_surgery_families import operated

GRAPHS = (
    "torch213_dynamo_qwen2_op18_float32", "torch213_torchscript_qwen2_op17_float32", "gpt2-torchscript-14-float32",
    "bloom-dynamo-18-float32", "gptneox-torchscript-17-float32", "gemma3-dynamo-18-float32", "opt-dynamo-18-float32",
)  # fmt: skip


EXCHANGED = ("Mul", "Add", "Sub", "Div", "MatMul", "Concat")
MASKING = ("LessOrEqual", "Less", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not", "Trilu", "Range")


def disturb(model: onnx.ModelProto, seed: int, masks: bool = False) -> tuple[onnx.ModelProto, str]:
    """One random disturbance of the graph, and what it is. With `masks`, of a node that masks are made of."""
    choose = random.Random(seed)
    model = copy.deepcopy(model)
    del model.graph.value_info[:]  # it may no longer be true
    kind = choose.choice(("take out", "exchange", "constant", "attribute"))
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    suitable = [node for node in nodes if _suits(node, kind, model)]
    if masks:
        kind = choose.choice(("take out", "exchange"))
        suitable = [node for node in nodes if node.op_type in MASKING and _suits(node, kind, model)]
    node = choose.choice(suitable)
    what = f"{kind}: {node.op_type} {node.name}"
    if kind == "take out":
        source, gone = choose.choice([name for name in node.input if name]), node.output[0]
        for other in model.graph.node:
            other.input[:] = [source if name == gone else name for name in other.input]
    elif kind == "exchange":
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif kind == "constant":
        what += " " + _change_constant(model, node, choose)
    else:
        attribute = choose.choice([each for each in node.attribute if each.name in ("axis", "epsilon", "keepdims")])
        if attribute.name == "epsilon":
            attribute.f *= 100
        else:
            attribute.i = choose.choice((0, 1, -2)) if attribute.name == "axis" else 1 - attribute.i
    return model, what


def _suits(node: onnx.NodeProto, kind: str, model: onnx.ModelProto) -> bool:
    outputs = {value.name for value in model.graph.output}
    if kind == "take out":
        return len(node.output) == 1 and node.output[0] not in outputs and len(node.input) > 0
    if kind == "exchange":
        return node.op_type in (*EXCHANGED, *MASKING) and len(node.input) == 2
    if kind == "constant":
        return any(_small_constants(model, node))
    return any(each.name in ("axis", "epsilon", "keepdims") for each in node.attribute)


def _small_constants(model: onnx.ModelProto, node: onnx.NodeProto) -> list[onnx.TensorProto]:
    """The node's constant inputs of one to eight elements."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for other in model.graph.node:
        if other.op_type == "Constant" and other.attribute[0].name == "value":
            constants[other.output[0]] = other.attribute[0].t
    found = [constants[name] for name in node.input if name in constants]
    # a changed boolean hides everything, and a token that sees nothing means nothing
    return [tensor for tensor in found if 0 < np.prod(tensor.dims) <= 8 and tensor.data_type != onnx.TensorProto.BOOL]


def _change_constant(model: onnx.ModelProto, node: onnx.NodeProto, choose: random.Random) -> str:
    tensor = choose.choice(_small_constants(model, node))
    values = numpy_helper.to_array(tensor)
    changed = values * choose.choice((0.5, 1.5, -1)) if values.dtype.kind == "f" else values + choose.choice((-1, 1, 2))
    fresh = numpy_helper.from_array(changed.astype(values.dtype), f"{tensor.name}_changed")
    users = [other for other in model.graph.node if tensor.name in other.input]
    if any(other is not node for other in users) or tensor.name not in {t.name for t in model.graph.initializer}:
        model.graph.initializer.append(fresh)  # others keep what they share with it
        old = next(name for name in node.input if name == tensor.name or _is_value(model, name, tensor))
        node.input[:] = [fresh.name if name == old else name for name in node.input]
    else:
        fresh.name = tensor.name
        tensor.CopyFrom(fresh)
    return f"{values.tolist()} -> {changed.tolist()}"


def _is_value(model: onnx.ModelProto, name: str, tensor: onnx.TensorProto) -> bool:
    return any(
        name in node.output and node.attribute[0].t is tensor for node in model.graph.node if node.op_type == "Constant"
    ) or any(name in node.output and node.op_type == "Constant" and node.attribute[0].t == tensor for node in model.graph.node)


def check(name: str, seed: int, folder, masks: bool = False) -> str:
    """Raises AssertionError where surgery makes something else of the disturbed graph. Returns what was found."""
    disturbed, what = disturb(weightless.load(name), seed, masks)
    try:
        expected = decode(disturbed, alone=True)
    except Exception:  # onnxruntime's errors have no base; a graph that does not run says nothing
        return "does not run"
    if not all(np.isfinite(values).all() and np.abs(values).max() > 0 for values in expected.values()):
        return "not a number"
    try:
        portable, _ = operated(disturbed, folder)
    except UserError as refusal:
        return f"refused: {refusal}"
    try:
        found = decode(portable, alone=True)  # a disturbance may mix rows, or tokens with padding
    except Exception:
        assert _is_empty(disturbed), f"{name}, {what}: what surgery writes does not run"
        return "empty"
    error = largest_error(expected, found)
    if error < 1e-4:
        return "equal"
    if _sees_nothing(disturbed):
        return "sees nothing"
    assert error < 10 * _sensitivity(disturbed, expected), f"{name}, {what}: {error}"
    return "ill-conditioned"


def _sees_nothing(model: onnx.ModelProto) -> bool:
    """Whether a mask hides all slots from some token: what its attention gives then is nobody's business."""
    return any(scores.max(axis=-1).min() < -1e30 for scores in _shown(model, "Softmax", lambda node: node.input[0]))


def _is_empty(model: onnx.ModelProto) -> bool:
    """Whether a Slice leaves nothing over, which onnxruntime joins to a cache as if it were not there."""
    return any(part.ndim > 1 and part.size == 0 for part in _shown(model, "Slice", lambda node: node.output[0]))


def _shown(model: onnx.ModelProto, op: str, which: Callable[[onnx.NodeProto], str]) -> list[np.ndarray]:
    """A tensor of each node of the op, at both steps of a prompt."""
    shown = copy.deepcopy(model)
    names = sorted({which(node) for node in model.graph.node if node.op_type == op})
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    steps = Steps(shown, rows=1)
    steps.also = names
    values = []
    for count in (7, 4):
        steps.step(np.full((1, count), 5), np.array([count]))
        values += steps.shown
    return values


def _sensitivity(model: onnx.ModelProto, expected: dict[str, np.ndarray]) -> float:
    """How much outputs change where weights change by no more than float32 rounds."""
    shaken = copy.deepcopy(model)
    for tensor in shaken.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 64:
            values = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(0).uniform(-1, 1, values.shape) * np.finfo(np.float32).eps
            tensor.CopyFrom(numpy_helper.from_array((values * (1 + noise)).astype(np.float32), tensor.name))
    return largest_error(expected, decode(shaken, alone=True))


EXAMPLES = [6, pytest.param(48, marks=pytest.mark.slow)]


@pytest.mark.parametrize("masks", [False, True], ids=["graph", "mask"])
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.sample("6-graph")
@pytest.mark.seconds
def test_what_is_disturbed_is_never_fused_into_something_else(examples, masks, tmp_path_factory):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(name=st.sampled_from(GRAPHS), seed=st.integers(0, 10_000))
    def disturbed(name: str, seed: int) -> None:
        assume(check(name, seed, tmp_path_factory.mktemp("disturbed"), masks) != "does not run")

    disturbed()

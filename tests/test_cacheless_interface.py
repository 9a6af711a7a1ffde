"""A graph without caches: what a name says of its inputs and outputs counts only where type and shape say so too."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import suture
from suture.core.proof.steps import Steps
from suture.core.signature import find_signature

IR = '<ir_version: 10, opset_import: ["" : 21]>'


def signature(value: str):
    kind, name = value.split()
    model = onnx.parser.parse_model(f"{IR} g ({value}) => ({kind} y) {{ y = Identity({name}) }}")
    return find_signature(model, need_caches=False)


@pytest.mark.parametrize(
    ("value", "role", "found"),
    [
        ("float16[1,7,32] positions", "positions", False),
        ("float[B,S] positions", "positions", False),
        ("int64[1,7,3] position_ids", "positions", False),
        ("int64[N] position_ids", "positions", False),
        ("int64[B,S] position_ids", "positions", True),
        ("int64[3,B,S] position_ids", "positions", True),
        ("float[B,N,C] image_tokens", "tokens", False),
        ("int64[N] tokens", "tokens", False),
        ("float[B,3,H,W] tokens", "tokens", False),
        ("int32[B,S] input_ids", "tokens", True),
        ("float[B,N,16] tokens", "tokens", True),
        ("float[N] loss_mask", "mask", False),
        ("int64[B,S] attention_mask", "mask", True),
    ],
)
def test_a_name_needs_its_type_and_shape(value, role, found):
    assert getattr(signature(value), role) == (value.split()[-1] if found else None)


@pytest.mark.parametrize("name", ["logits", "output"])
@pytest.mark.parametrize("inputs", ["float[1,7,32] x, float[1,7,32] positions", "int64[B,S] input_ids, float[B,7,32] x"])
def test_all_rows_of_logits_that_are_no_tokens_count(name, inputs):
    """Of seven queries, say: that the last is the same is not enough."""
    batch, known = ("1", "positions") if "positions" in inputs else ("B", "x")
    text = f"{IR} g ({inputs}) => (float[{batch},7,32] {name}) {{ a = Add(x, {known}) {name} = Mul(a, w) }}"
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(32, np.float32), "w"))
    steps = Steps(model, find_signature(model, need_caches=False))
    made = np.arange(4 * 7 * 32, dtype=np.float32).reshape(4, 7, 32)
    (read,) = steps.select(steps.all_fitting()[0], {name: made}).values()
    assert read.shape == made.shape
    assert suture.operate(model).report.proof["status"] == "passed"

"""A branch of a decoder inside one If, taken out: it computes what the If did with that condition."""

import numpy as np
import onnx
import pytest
from foreign_graphs import load

import suture
from suture.core.errors import UserError
from suture.core.proof.verdict import PASSED
from suture.surgery.graph.branches import take
from suture.surgery.operate import operate
from suture.surgery.options import SurgeryOptions
from tests.test_foreign_graphs import run

STEPS = {"prompt": (2, 5, 0), "one row": (1, 5, 0), "one token": (2, 1, 6), "one row's token": (1, 1, 6), "chunk": (2, 3, 4)}
TWO = """<ir_version: 10, opset_import: ["": 18]> g (bool flag, float[N] x, float[N] z) => (float[N] y, float[N] w)
    <float two = {2}> { y, w = If(flag) <
        then_branch = a () => (float[N] p, float[N] q) { p = Mul(x, two) q = Identity(z) },
        else_branch = b () => (float[N] r, float[N] s) { r = Add(x, z) s = Neg(r) }> }"""


def feeds(rows: int, tokens: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        "input_ids": rng.integers(0, 160, (rows, tokens)),
        "attention_mask": np.ones((rows, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
    }
    for layer in range(2):
        for role in ("key", "value"):
            made[f"past_key_values.{layer}.{role}"] = rng.standard_normal((rows, 2, past, 16)).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def merged() -> onnx.ModelProto:
    return load("merged_if")


@pytest.fixture(scope="module")
def taken(merged) -> dict[str, onnx.ModelProto]:
    return {name: operate(merged, SurgeryOptions(branch=name, cache="growing")).portable for name in ("then", "else")}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("branch", ["then", "else"])
@pytest.mark.seconds
def test_a_branch_computes_what_the_if_did(branch, step, merged, taken):
    """The else branch has no past and takes the inputs of one all the same; its own, empty one is of two rows."""
    given = feeds(*STEPS[step])
    expected = run(merged, given | {"use_cache_branch": np.array([branch == "then"])})
    found = run(taken[branch], {name: given[name] for name in (value.name for value in taken[branch].graph.input)})
    for name, values in expected.items():
        assert values.shape == found[name].shape
        assert np.abs(values - found[name]).max(initial=0) < 1e-5 * np.abs(values).max(initial=1)


@pytest.mark.parametrize("branch", ["then", "else"])
def test_what_comes_from_outside_and_what_goes_out(branch):
    model = onnx.parser.parse_model(TWO)
    given = {"x": np.array([1, 2], np.float32), "z": np.array([3, 5], np.float32)}
    expected = run(model, given | {"flag": np.array(branch == "then")})
    (note,) = take(model, "here", branch)
    assert f"the branch {branch} was taken" in note
    assert [value.name for value in model.graph.input] == ["x", "z"]
    found = run(model, given)
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_a_branch_must_be_chosen_and_be_there(merged):
    with pytest.raises(UserError, match="--branch then, else or past"):
        take(onnx.ModelProto.FromString(merged.SerializeToString()), "here", None)
    with pytest.raises(UserError, match="not one branch reads a cache"):
        take(onnx.parser.parse_model(TWO), "here", "past")
    plain = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    with pytest.raises(UserError, match="leave it out"):
        take(plain, "here", "then")
    assert take(plain, "here", None) == []


def test_the_branch_that_reads_a_cache_is_found(merged):
    model = onnx.ModelProto.FromString(merged.SerializeToString())
    (note,) = take(model, "here", "past")
    assert "the branch then was taken" in note


def test_an_if_without_caches_stays_a_condition():
    """Which TensorRT has, too: there is nothing to choose."""
    source = onnx.parser.parse_model(TWO)
    assert take(source, "here", None) == []
    operated = suture.operate(source)
    assert operated.report.proof["status"] == PASSED
    assert [node.op_type for node in operated.portable.graph.node] == ["If"]
    x, z = np.array([1, 2], np.float32), np.array([3, 5], np.float32)
    for flag in (True, False):
        expected = run(source, {"x": x, "z": z, "flag": np.array(flag)})
        found = run(operated.portable, {"x": x, "z": z, "flag": np.array(flag)})
        assert all(np.array_equal(found[name], values) for name, values in expected.items())

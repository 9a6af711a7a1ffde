"""Names of axes that follow from other axes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from suture.build.ranges import default_ranges, given_ranges
from suture.core import axes
from suture.core.network.inputs import make_noise
from suture.core.shapes import ShapeRange


@pytest.mark.parametrize(
    ("name", "expected"),
    [("height", 24), ("8*height", 192), ("height/4", 6), ("past + sequence", 12), ("past + 1", 6), ("2*past + height/8", 13)],
)
def test_a_length_follows_from_others(name, expected):
    assert axes.length(name, {"height": 24, "past": 5, "sequence": 7}) == expected


@pytest.mark.parametrize("name", ["width", "8*width", "past + width", "8*", "/8", "a-b", "height*8", ""])
def test_what_does_not_follow(name):
    assert axes.length(name, {"height": 24, "past": 5}) is None


def test_the_other_name_is_solved_for():
    assert axes.solved("8*height", 512) == ("height", 64)
    assert axes.solved("height/4", 16) == ("height", 64)
    assert axes.solved("past + sequence", 9) is None
    assert axes.solved("height", 9) is None


def test_all_axes_are_whole():
    assert axes.divisors(["height", "height/4", "height/6", "8*width"]) == {"height": 12, "width": 1}


def graph(*inputs: tuple[str, list]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _ in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, shape) for name, shape in inputs]
    return helper.make_model(helper.make_graph(nodes, "g", values, outputs))


LATENTS, HINT, BELOW = ("x", ["batch", 4, "h", "w"]), ("hint", ["batch", 3, "8*h", "8*w"]), ("low", ["batch", 2, "h/2", "w/2"])


@pytest.mark.parametrize("inputs", [(LATENTS, HINT, BELOW), (HINT, BELOW, LATENTS), (BELOW, HINT, LATENTS)])
def test_made_up_inputs_go_together_in_any_order(inputs):
    made = make_noise(graph(*inputs), 0, {})
    height, width = made["x"].shape[2:]
    assert made["hint"].shape[2:] == (8 * height, 8 * width)
    assert made["low"].shape[2:] == (height // 2, width // 2)
    assert np.isfinite(made["x"]).all()


def test_a_range_that_is_given_is_that_of_what_follows():
    shapes = {"x": ShapeRange((1, 4, 8, 8), (2, 4, 64, 64), (4, 4, 96, 128))}
    found = given_ranges(graph(LATENTS, HINT, BELOW), shapes)
    assert found["hint", 2] == (64, 512, 768)
    assert found["low", 3] == (4, 32, 64)
    assert found["low", 0] == (1, 2, 4)


def test_usual_ranges_go_together():
    found = default_ranges(graph(LATENTS, HINT, BELOW), 2, None)
    assert found["hint", 2] == tuple(8 * size for size in found["x", 2])

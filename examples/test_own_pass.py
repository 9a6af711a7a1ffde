"""python -m pytest test_own_pass.py"""

import own_pass
from onnx import parser

from suture.testing import check_pass, near_misses


def test_it_leaves_out_a_clip_without_bounds():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 24]> g (float[N,4] x) => (float[N,4] y)'
        "<float low = {-inf}, float high = {inf}> { a = Relu(x) b = Clip(a, low, high) y = Neg(b) }"
    )
    assert check_pass(own_pass.run, model) == 1


def test_a_bound_that_is_computed_is_a_near_miss():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 24]> g (float[N,4] x, float high) => (float[N,4] y)'
        "<float low = {-inf}> { a = Relu(x) b = Clip(a, low, high) y = Neg(b) }"
    )
    assert check_pass(own_pass.run, model) == 0
    assert near_misses(own_pass.run, model) == ["a bound is computed"]

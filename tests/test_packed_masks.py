"""Masks of one axis of com.microsoft's Attention: lengths [B], ends and starts [2B], lengths and running sums [3B + 2]."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import parse
from suture.surgery.operate import operate
from tests.test_foreign_graphs import run

ROWS, SLOTS = 3, 5
MASKS = {
    "lengths": [5, 3, 2],
    "ends and starts": [5, 3, 4, 0, 1, 2],
    "lengths and running sums": [5, 3, 2, 0, 5, 8, 10, 0, 5, 8, 10],
}


def model(count: str, causal: int) -> onnx.ModelProto:
    found = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[B, S, 16] x, int32[{count}] mask) => (float[B, S, 16] y)
        {{ y = com.microsoft.Attention<num_heads = 2, unidirectional = {causal}>(x, w, b, mask) }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (16, 48)), ("b", (48,))):
        found.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) * 0.4).astype(np.float32), name))
    return found


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("count", ["M", "B"])
def test_a_mask_of_one_axis_is_what_its_length_says(count, causal, tmp_path):
    """Whatever the axis is called. Tokens before a row's first slot see nothing where it is causal, and mean nothing."""
    source = model(count, causal)
    done = operate(source)
    assert [node.op_type for node in done.portable.graph.node].count("Attention") == 1
    assert not any(node.domain for node in done.portable.graph.node)
    onnx.save(done.lowered, tmp_path / "model.onnx")
    evaluate = Evaluator(parse(tmp_path / "model.onnx"), "cpu")
    x, results = np.random.default_rng(1).standard_normal((ROWS, SLOTS, 16)).astype(np.float32), []
    for numbers in MASKS.values():
        feeds = {"x": x, "mask": np.array(numbers, np.int32)}
        starts = numbers[ROWS:] if len(numbers) == 2 * ROWS and causal else [0] * ROWS
        rows = np.arange(SLOTS) >= np.array(starts)[:, None]
        expected = run(source, feeds)["y"][rows]
        for found in (run(done.portable, feeds)["y"], evaluate(feeds)["y"].numpy()):
            assert np.abs(found[rows] - expected).max() < 1e-5 * np.abs(expected).max()
        results.append(run(source, feeds)["y"])
    assert np.abs(results[0] - results[1]).max() > 0.1  # the starts count

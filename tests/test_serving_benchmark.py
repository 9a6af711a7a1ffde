"""The benchmark of serving, against two servers of the smallest graph."""

import json

import pytest

from benchmarks import serving
from suture.models.named import checkpoint_folder

pytestmark = pytest.mark.benchmarks


def test_two_servers_in_turn(tiny_portable, tmp_path):
    line = [str(tiny_portable / "model.onnx"), "--servers", "2", "--side-by-side", "2", "--requests", "4", "--length", "9"]
    line += [
        "--answer",
        "5",
        "--vocab",
        "200",
        "--out",
        str(tmp_path / "found.json"),
        "--serve",
        f"=--checkpoint={checkpoint_folder('tiny-qwen')}",
    ]
    assert serving.main(line) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["servers"], found["requests"], found["whole"]) == (2, 4, True)
    assert found["tokens_per_s"] > 0

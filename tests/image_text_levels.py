"""The parts of a vision-language model through surgery and validation's levels 1 to 3."""

import json
from pathlib import Path

import onnx

from suture.core.parts import find_parts
from suture.surgery.__main__ import main as surgery
from suture.validate.options import ValidateOptions
from suture.validate.stage import validate_pipeline


def check_levels(folder: Path, fused: dict[str, dict[str, int]]) -> None:
    """`folder`: of what export wrote. `fused`: of a part, by name, how many nodes of an operator surgery leaves."""
    parts = find_parts(folder)
    assert [part.name for part in parts] == ["vision", "embed", "decoder"]
    for part in parts:
        capacity = ["--capacity", "64"] if part.name == "decoder" else []
        assert surgery([str(part.folder / "export" / "model.onnx"), "--out", str(part.folder / "surgery"), *capacity]) == 0
        graph = onnx.load(part.folder / "surgery" / "model.onnx", load_external_data=False).graph
        expected = fused.get(part.name, {})
        assert {op: sum(node.op_type == op for node in graph.node) for op in expected} == expected
    assert validate_pipeline(folder, ValidateOptions()) == 0
    levels = json.loads((folder / "validate" / "report.json").read_text())["levels"]
    assert [level["status"] for level in levels if level["number"] in (1, 2, 3)] == ["passed"] * 9

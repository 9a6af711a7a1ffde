"""Kind 6: graphs that compute NaN or infinity, on one side or on both: a difference, with a report."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.abuse.case import Case

PROMISE = "NaN and infinity are never equal to anything: a difference, with a report"
SIDES = {"the reference": ("a",), "the candidate": ("b",), "both": ("a", "b")}
VALUES = {
    "NaN": np.nan,
    "infinity": np.inf,
    "minus infinity": -np.inf,
    "a NaN of another kind": np.uint32(0xFFC0_0001).view(np.float32),
}
GRAPHS = ("{work}/a/model.onnx", "{work}/b/model.onnx", "--out", "{work}/out")


def poisoned(value: float, sides: tuple[str, ...], whole: bool) -> Callable[[Path], None]:
    """All of the largest weight, which is the embedding or as large, or one value of each of its rows."""

    def damage(work: Path) -> None:
        for side in ("a", "b"):
            model = onnx.load(work / "static" / "model.onnx")
            if side in sides:
                tensor = max((t for t in model.graph.initializer if t.data_type == t.FLOAT), key=lambda t: len(t.raw_data))
                values = numpy_helper.to_array(tensor).copy()
                values[(slice(None),) if whole else (slice(None), 0)] = value
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            (work / side).mkdir()
            onnx.save(model, work / side / "model.onnx")

    return damage


def computed(operator: str, sides: tuple[str, ...]) -> Callable[[Path], None]:
    """The logits go through an operator that has no value, or an infinite one, for what it is given."""
    factor, offset = {"Sqrt": (1e-3, -1e3), "Log": (1e-3, -1e3), "Exp": (1e-3, 1e3), "Acos": (1e-3, 1e3), "Reciprocal": (0, 0)}[
        operator
    ]

    def damage(work: Path) -> None:
        for side in ("a", "b"):
            model = onnx.load(work / "static" / "model.onnx")
            if side in sides:
                node = next(node for node in model.graph.node if "logits" in node.output)
                node.output[:] = ["before"]
                for name, value in (("factor", factor), ("offset", offset)):
                    model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
                steps = (
                    ("Mul", ["before", "factor"], "scaled"),
                    ("Add", ["scaled", "offset"], "moved"),
                    (operator, ["moved"], "logits"),
                )
                model.graph.node.extend(
                    onnx.helper.make_node(op, given, [made], name=f"beyond.{made}") for op, given, made in steps
                )
            (work / side).mkdir()
            onnx.save(model, work / side / "model.onnx")

    return damage


def reported(work: Path) -> str | None:
    return None if (work / "out" / "report.html").is_file() else "no report"


CASES = [
    Case(6, stage, f"{name} in {where} of {side}", PROMISE, poisoned(value, sides, whole), expected=(1,), arguments=GRAPHS,
         prints_not="validate: passed", after=reported)
    for stage in ("validate", "compare") for name, value in VALUES.items() for side, sides in SIDES.items()
    for where, whole in (("all", True), ("a column", False))
] + [
    Case(6, stage, f"{operator} of {side}", PROMISE, computed(operator, sides), expected=(1,), arguments=GRAPHS,
         prints_not="validate: passed", after=reported)
    for stage in ("validate", "compare") for operator in ("Sqrt", "Log", "Exp", "Acos", "Reciprocal") for side, sides in SIDES.items()
]  # fmt: skip

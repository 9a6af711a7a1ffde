"""Kind 7: what a stage has written, and the next cannot use: a check that failed, never one that was not run."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from tests.abuse.case import Case
from tests.abuse.damages import IN_ITS_PLACE, at, instead
from tests.abuse.graphs import BROKEN, small
from tests.abuse.kind_10_values import GRAPHS

PROMISE = "an arrow that broke is a difference with a report, and never passed"


def edited(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return damage


def small_graph(name: str | None) -> Callable[[Path], None]:
    """Another model's graph, or one that is not valid ONNX."""

    def damage(path: Path) -> None:
        model = small()
        if name:
            BROKEN[name][0](model)
        path.write_bytes(model.SerializeToString())

    return damage


def set_zero(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == onnx.TensorProto.FLOAT:
        tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))


def rename(model: onnx.ModelProto, what: str) -> None:
    for value in getattr(model.graph, what):
        for node in model.graph.node:
            names = getattr(node, what)
            names[:] = [f"other.{name}" if name == value.name else name for name in names]
        value.name = f"other.{value.name}"


DAMAGES = {
    "gone": Path.unlink,
    **GRAPHS,
    **{name: instead(make) for name, make in IN_ITS_PLACE.items()},
    "without logits": edited(lambda model: model.graph.output.pop(0)),
    "without nodes": edited(lambda model: model.graph.ClearField("node")),
    "without outputs": edited(lambda model: model.graph.ClearField("output")),
    "without weights": edited(lambda model: model.graph.ClearField("initializer")),
    "without a cache": edited(lambda model: model.graph.output.pop()),
    "weights all zero": edited(lambda model: [set_zero(tensor) for tensor in model.graph.initializer]),
    "outputs renamed": edited(lambda model: rename(model, "output")),
    "inputs renamed": edited(lambda model: rename(model, "input")),
    "a node less": edited(lambda model: model.graph.node.pop()),
    "another opset": edited(lambda model: setattr(model.opset_import[0], "version", 1)),
    "text for numbers": edited(lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 8)),
    "another model's": small_graph(None),
    **{name: small_graph(name) for name in ("no imports", "cycle", "unknown operator", "short data", "weight's type")},
}


def pipeline(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """The good pipeline's folder; its manifests still list what is damaged."""
    return at("pipeline/surgery", damage)


def failed(work: Path) -> str | None:
    report = work / "pipeline" / "validate" / "report.json"
    if not report.is_file():
        return "no report"
    return "it says passed" if json.loads(report.read_text())["verdict"] == "passed" else None


CASES = [
    Case(7, "validate", f"{name} for {file}", PROMISE, pipeline(at(file, damage)), expected=(1,), arguments=("{work}/pipeline",),
         prints_not="validate: passed", after=failed, writes="pipeline/validate")
    for file in ("model.trt.onnx", "model.onnx") for name, damage in DAMAGES.items()
]  # fmt: skip

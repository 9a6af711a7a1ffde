"""Kind 13: invalid graphs, which onnxruntime would refuse to load: refused where they are read, by every stage."""

from pathlib import Path

import onnx

from tests.abuse.case import CUTTERS, GRAPH_STAGES, SECOND, Case
from tests.abuse.graphs import BROKEN, NO_FORM, NOT_LOADED, small

PROMISE = "a graph that is not valid ONNX is refused in one line, and none is written"


def broken(name: str):
    def damage(folder: Path) -> None:
        model = small()
        BROKEN[name][0](model)
        for place in ("graphs", "static", "pair"):
            (folder / place / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def not_loaded(name: str):
    """One output beside the If's: a graph that is one If is two."""

    def damage(folder: Path) -> None:
        model = small()
        NOT_LOADED[name](model)
        model.graph.output.append(onnx.ValueInfoProto(name="r"))
        (folder / "graphs" / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def no_form(name: str):
    def damage(folder: Path) -> None:
        model = small()
        NO_FORM[name](model)
        (folder / "graphs" / "model.onnx").write_bytes(model.SerializeToString())

    return damage


CASES = [
    Case(13, "surgery", name, PROMISE, no_form(name), "type" if "operator" in name else "must be tensors") for name in NO_FORM
] + [
    Case(13, stage, name, PROMISE, broken(name), BROKEN[name][1]) for stage in (*GRAPH_STAGES, *CUTTERS) for name in BROKEN
] + [
    Case(13, "surgery.join", f"{name}, the second", PROMISE, broken(name), BROKEN[name][1], arguments=SECOND) for name in BROKEN
] + [
    Case(13, stage, name, PROMISE, not_loaded(name), "onnxruntime", more=("--no-verify",) * stage.startswith("surgery"))
    for stage in ("surgery", "validate", "compare") for name in NOT_LOADED
]  # fmt: skip

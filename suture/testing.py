"""For tests of passes of your own."""

from collections.abc import Callable
from pathlib import Path

import onnx

from suture.core.weights import load_graph, weights_root
from suture.surgery.graph import Graph, files
from suture.surgery.passes import Pass
from suture.surgery.runner import apply
from suture.surgery.verification.verify import ChangedOutput, Verifier


def check_pass(run: Callable[[Graph], int], model: onnx.ModelProto | Path | str, root: Path | str | None = None) -> int:
    """Runs a pass on a model, and the graph before and after it in onnxruntime on the same valid inputs: of a decoder, steps
    with cached keys and values, padded and not; of other graphs, normal noise. Returns how often the pass matched.

    `root`: the folder that a model's external weights are relative to; a file says so itself. Raises AssertionError where an
    output differs by more than 1e-4 of its largest value (2e-2 in float16), with the first tensor that does, or where onnxruntime
    cannot run the graph; UserError where the model cannot be read.
    """
    graph, folder = _read(model, root)
    verifier = Verifier(files.to_model(graph), graph.signature, folder)
    own = getattr(run, "__module__", "pass").rpartition(".")[2]
    matches = apply(graph, Pass(own, (run.__doc__ or "").strip(), run))
    if not isinstance(matches, int):
        raise AssertionError(f"{own}: run(graph) returned {matches!r}, not the number of matches")
    try:
        verdict = verifier(own, graph)
    except ChangedOutput as found:
        raise AssertionError(str(found)) from None
    if verdict.unverified:
        raise AssertionError(f"{own}: not compared: {verdict.unverified}")
    return matches


def near_misses(run: Callable[[Graph], int], model: onnx.ModelProto | Path | str, root: Path | str | None = None) -> list[str]:
    """Runs a pass on a model. Returns why it left out what it nearly matched: the reasons given to `need`, in the order in which it
    met them. `model` and `root` as check_pass takes them. Raises UserError where the model cannot be read."""
    graph, _ = _read(model, root)
    run(graph)
    return [miss.reason for miss in graph.near_misses]


def _read(model: onnx.ModelProto | Path | str, root: Path | str | None) -> tuple[Graph, Path]:
    """The graph, and the folder of its external weights."""
    name = Path("model") if isinstance(model, onnx.ModelProto) else Path(model)
    if isinstance(model, onnx.ModelProto):
        source = onnx.ModelProto()
        source.CopyFrom(model)  # reading uses it up
        folder = Path(root or ".")
    else:
        source, folder = load_graph(name), weights_root(name)
    graph = files.of_model(source, name, folder)
    files.remove_unused(graph)
    return graph, folder

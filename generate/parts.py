"""A part of a model, opened to be run here."""

from collections.abc import Callable

import numpy as np
import onnx

from suture.core.errors import UserError
from suture.core.manifest import result
from suture.core.parts import PartFolder
from suture.core.refusals import refusals
from suture.core.shadow_copy import runnable
from suture.core.weights import load_graph, weights_root
from suture.runtime.engine import Engine, read_description, run_once, why_not
from suture.runtime.graphs import fast_session

GRAPHS = ("surgery/model.onnx", "export/model.onnx")
Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]


def open_part(part: PartFolder, runtime: str) -> tuple[Run, onnx.ModelProto]:
    """The part's engine where one can run here, else its portable graph in onnxruntime; and that graph. Floats may come in as
    float32. Raises UserError where there is neither, or not what `runtime` asks for."""
    graph = next((path for name in GRAPHS if (path := result((part.folder / name).parent, "model.onnx"))), None)
    engine = result(part.folder / "build", "model.engine")
    if graph is None:
        raise UserError(part.folder, "has neither surgery/model.onnx nor export/model.onnx", "run the pipeline again")
    proto = load_graph(graph)
    if engine is not None and runtime in ("auto", "engine"):
        description = read_description(engine.with_name("engine.json"))
        reason = why_not(description)
        if reason is None:
            opened = Engine(engine, description, engine.parent / description["weights"]["root"])
            return (lambda inputs: run_once(opened, inputs)), proto
    if runtime == "engine":
        raise UserError(part.folder, reason if engine else "no engine has been built", "leave --runtime out")
    session = fast_session(runnable(proto), weights_root(graph), str(graph), "cuda" if runtime == "cuda" else "cpu")
    halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        feeds = {name: value.astype(np.float16) if name in halves else value for name, value in inputs.items()}
        with refusals(graph, "onnxruntime cannot run it", "export it again"):
            return dict(zip(names, session.run(names, feeds)))

    return run, proto

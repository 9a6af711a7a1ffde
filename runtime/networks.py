"""A graph without caches as a function of arrays by name, in onnxruntime or as TensorRT's parser understands it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch

from suture.core.as_written import open_session
from suture.core.errors import UserError
from suture.core.network.dtypes import TORCH
from suture.core.network.evaluate import Evaluator
from suture.core.network.parse import parse
from suture.core.network.runner import to_numpy
from suture.core.refusals import refusals
from suture.core.sessions import FUSED, NotLoaded, new_session
from suture.core.shadow_copy import runnable
from suture.core.weights import load_graph, weights_root

Arrays = dict[str, np.ndarray]
Network = Callable[[Arrays], Arrays]


def in_onnxruntime(path: Path, fast: bool = False) -> Network:
    """A session on the CPU; a bfloat16 graph runs as its float32 shadow copy. Floats may come in as float32, whatever the graph takes.
    `fast`: with all of onnxruntime's fusions, and not as it is written. Raises UserError."""
    graph, root = load_graph(path), weights_root(path)
    try:
        session = new_session(runnable(graph), root, level=FUSED) if fast else open_session(graph, root, str(path))
    except NotLoaded as error:
        raise UserError(path, f"onnxruntime cannot load it ({error})", "export it again") from None
    names = [output.name for output in session.get_outputs()]
    halves = {value.name for value in graph.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    taken = {each.name for each in session.get_inputs()}

    def run(inputs: Arrays) -> Arrays:
        feeds = {name: value.astype(np.float16) if name in halves else value for name, value in inputs.items() if name in taken}
        with refusals(path, "onnxruntime cannot run it", "export it again"):
            return dict(zip(names, session.run(names, feeds)))

    return run


def in_network(lowered: Path) -> Network:
    """What TensorRT's parser made of the lowered graph, evaluated layer by layer. Raises UserError where it refuses."""
    evaluate = Evaluator(parse(lowered))
    dtypes = {name: TORCH[evaluate.network.tensors[name].dtype] for name in evaluate.network.inputs}

    def run(inputs: Arrays) -> Arrays:
        outputs = evaluate({name: torch.from_numpy(np.asarray(inputs[name])).to(dtype) for name, dtype in dtypes.items()})
        return {name: to_numpy(value) for name, value in outputs.items()}

    return run

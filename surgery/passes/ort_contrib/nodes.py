"""Adds nodes of onnxruntime's contrib operators."""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph
from suture.surgery.shapes.foreign_shapes import DOMAIN


def append(graph: Graph, op: str, name: str, inputs: list, outputs: list[gs.Variable], attrs: dict) -> None:
    """Adds a node that makes `outputs`, which it takes from whatever made them. None is an input that is not given."""
    for output in outputs:
        output.inputs.clear()
    filled = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
    graph.gs.nodes.append(gs.Node(op, graph.unique(name), attrs, filled, outputs, domain=DOMAIN))

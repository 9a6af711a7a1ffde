"""Attributes for which TensorRT's parser has other defaults than ONNX are written out.

Trilu(x)   →   Trilu(x, upper = 1)           without it the parser keeps the lower triangle
Selu(x)    →   Selu(x, alpha, gamma)         without them it takes those of opset 1
"""

import onnx_graphsurgeon as gs

from suture.core.traits import traits
from suture.surgery.graph import Graph

EXPLICIT = {"Trilu": ("upper",), "Selu": ("alpha", "gamma")}


def run(graph: Graph) -> int:
    return graph.match(_write, graph.nodes(*EXPLICIT))


def _write(graph: Graph, node: gs.Node) -> bool:
    defaults = {name: traits(node.op).attributes[name] for name in EXPLICIT[node.op] if name not in node.attrs}
    node.attrs.update(defaults)
    return bool(defaults)

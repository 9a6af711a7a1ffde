"""Swish becomes QuickGelu, onnxruntime's contrib operator.

    Swish(x)   →   QuickGelu(x, alpha=1)

Its CUDA provider has no kernel for the standard's.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph
from suture.surgery.passes.ort_contrib.nodes import append


def run(graph: Graph) -> int:
    return graph.match(_replace, graph.nodes("Swish"))


def _replace(graph: Graph, swish: gs.Node) -> bool:
    append(graph, "QuickGelu", swish.name, swish.inputs, swish.outputs[:], {"alpha": float(swish.attrs.get("alpha", 1.0))})
    return True

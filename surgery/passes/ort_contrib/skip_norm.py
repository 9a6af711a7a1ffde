"""A sum and the norm of it become one node, which gives both.

    s = x + skip;  y = RMSNormalization(s, weight)   →   y, s = SkipSimplifiedLayerNormalization(x, skip, weight)

onnxruntime does the same for LayerNormalization by itself.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, producer, rank, static_dim
from suture.surgery.passes.ort_contrib.nodes import append


def run(graph: Graph) -> int:
    return graph.match(_join, graph.nodes("RMSNormalization"))


def _join(graph: Graph, norm: gs.Node) -> bool:
    total, weight = norm.inputs
    sum_ = producer(total, "Add")
    if sum_ is None or any(rank(term) != rank(total) for term in sum_.inputs) or norm.attrs.get("axis", -1) != -1:
        return False
    if [static_dim(term, -1) for term in sum_.inputs] != [static_dim(weight, 0)] * 2:
        return False
    graph.need_known(norm, "X", "scale", "axis", "epsilon")
    nothing = [gs.Variable.empty(), gs.Variable.empty()]
    outputs = [norm.outputs[0], *nothing, total]
    attrs = {"epsilon": norm.attrs.get("epsilon", 1e-5)}
    append(graph, "SkipSimplifiedLayerNormalization", norm.name, [*sum_.inputs, weight], outputs, attrs)
    return True

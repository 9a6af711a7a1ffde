"""A mask that hides nothing is left out.

Attention(Q, K, V, ConstantOfShape(shape, true), …)   →   Attention(Q, K, V, "", …)
"""

import onnx_graphsurgeon as gs

from suture.core.traits import input_index
from suture.surgery.graph import Graph, input_of, producer


def run(graph: Graph) -> int:
    return graph.match(_unmask, graph.nodes("Attention"))


def _unmask(graph: Graph, attention: gs.Node) -> bool:
    filled = producer(input_of(attention, "attn_mask"), "ConstantOfShape")
    value = filled.attrs.get("value") if filled is not None else None
    if value is None or value.dtype != bool or not value.values.all():
        return False
    attention.inputs[input_index(attention.op, "attn_mask")] = gs.Variable.empty()
    while attention.inputs[-1].is_empty():
        attention.inputs.pop()
    return True

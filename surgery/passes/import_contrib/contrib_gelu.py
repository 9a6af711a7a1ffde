"""onnxruntime's GELUs become standard ones.

Gelu(x), BiasGelu(x, b)  →  Gelu(x), Gelu(x + b)
FastGelu(x, b)           →  Gelu(x + b, approximate=tanh)
QuickGelu(x, alpha)      →  Swish(x, alpha) = x * sigmoid(alpha * x)
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph
from suture.surgery.passes.import_contrib.nodes import contrib_nodes

QUICK_ALPHA = 1.702


def run(graph: Graph) -> int:
    return graph.match(_standard, contrib_nodes(graph, "Gelu", "BiasGelu", "FastGelu", "QuickGelu"))


def _standard(graph: Graph, node: gs.Node) -> bool:
    x, *bias, result = *node.inputs, node.outputs[0]  # each op calls its inputs otherwise
    if bias and not bias[0].is_empty():
        x = graph.new("Add", [x, bias[0]], name=f"{node.name}/bias", shape=x.shape)
    if node.op == "QuickGelu":
        graph.replace(result, "Swish", [x], {"alpha": node.attrs.get("alpha", QUICK_ALPHA)})
    else:
        graph.replace(result, "Gelu", [x], {"approximate": "tanh" if node.op == "FastGelu" else "none"})
    return True

"""SiLU, written out, becomes one Swish.

x * sigmoid(x)
"""

import onnx_graphsurgeon as gs

from surgery.graph import Graph, consumers, operands


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("Sigmoid"))


def _fuse(graph: Graph, sigmoid: gs.Node) -> bool:
    x, gate = sigmoid.inputs[0], sigmoid.outputs[0]
    products = [node for node in consumers(gate, "Mul") if any(pair == (x, gate) for pair in operands(node))]
    for product in products:
        graph.replace(product.outputs[0], "Swish", [x], {"alpha": 1.0})
    return bool(products)

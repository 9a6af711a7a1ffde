"""SiLU, written out, becomes one Swish; so does the quick approximation of GELU, with alpha = 1.702.

x * sigmoid(alpha * x)
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, consumers, operands, other_input, producer


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("Sigmoid"))


def _fuse(graph: Graph, sigmoid: gs.Node) -> bool:
    argument, gate = sigmoid.inputs[0], sigmoid.outputs[0]
    scaled = producer(argument, "Mul")
    alphas = {} if scaled is None else {id(x): graph.scalar(factor) for factor, x in operands(scaled)}
    alphas[id(argument)] = 1.0
    fused = 0
    for product in consumers(gate, "Mul"):
        x = other_input(product, gate)
        if alphas.get(id(x)) is not None:
            graph.replace(product.outputs[0], "Swish", [x], {"alpha": float(alphas[id(x)])})
            fused += 1
    return bool(fused)

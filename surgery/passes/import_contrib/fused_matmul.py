"""FusedMatMul becomes the product, the transposes and the factor that it was fused from.

FusedMatMul(a, b, alpha, transA, transB)  →  alpha * (a or a^T @ b or b^T)
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, onnx_type, rank
from suture.surgery.passes.import_contrib.nodes import contrib_nodes


def run(graph: Graph) -> int:
    return graph.match(_apart, contrib_nodes(graph, "FusedMatMul"))


def _apart(graph: Graph, node: gs.Node) -> bool:
    batches = node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0)
    need(not batches, "it transposes batch dimensions")
    alpha, result, dtype = node.attrs.get("alpha", 1.0), node.outputs[0], onnx_type(node.inputs[0])
    need(alpha == 1.0 or dtype is not None, "the type of its operands is not known")
    operands = []
    for x, side in zip(node.inputs, "AB"):
        if node.attrs.get(f"trans{side}", 0):
            need(rank(x) is not None and rank(x) > 1, f"the rank of the transposed operand is {rank(x)}")
            perm = [*range(rank(x) - 2), rank(x) - 1, rank(x) - 2]
            shape = [x.shape[axis] for axis in perm]
            x = graph.new("Transpose", [x], {"perm": perm}, name=f"{node.name}/transpose", shape=shape)
        operands.append(x)
    if alpha == 1.0:
        graph.replace(result, "MatMul", operands)
    else:
        product = graph.new("MatMul", operands, name=node.name, shape=result.shape)
        graph.replace(result, "Mul", [product, graph.number(alpha, dtype)], name=f"{node.name}/scale")
    return True

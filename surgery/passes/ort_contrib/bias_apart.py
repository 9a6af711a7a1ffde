"""A bias is added after the product.

    Gemm(x, W, b)   →   Gemm(x, W) + b

As a Gemm's C onnxruntime copies it into each row of the result first, and reads that again.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph


def run(graph: Graph) -> int:
    return graph.match(_part, graph.nodes("Gemm"))


def _part(graph: Graph, gemm: gs.Node) -> bool:
    if len(gemm.inputs) < 3 or gemm.inputs[2].is_empty() or gemm.attrs.get("beta", 1.0) != 1.0:
        return False
    result, bias = gemm.outputs[0], gemm.inputs[2]
    product = graph.new("Gemm", gemm.inputs[:2], dict(gemm.attrs), gemm.name, shape=result.shape)
    graph.replace(result, "Add", [product, bias], name=f"{gemm.name}/bias")
    return True

"""Gate and up become one product where their weights follow one another in a file.

    Gemm(x, W1), Gemm(x, W2)   →   split(Gemm(x, [W1; W2]))

TensorRT makes one product of them in any case, but of weights that are apart it makes a copy, which it holds until the
engine is written: of Qwen-7B 180 MB a layer. Neighbours are one weight already, so nothing is written here, and what
`--merge` merged before stays as it is.
"""

from suture.surgery.graph import Graph
from suture.surgery.passes.portable import merged_weights


def run(graph: Graph, only: int | None = None) -> int:
    """`only`: in graphs of this ONNX type."""
    if only is not None and graph.signature.dtype != only:
        return 0
    return merged_weights.run(graph, ("gate-up",), anew=False)

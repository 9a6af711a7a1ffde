"""Attention that TensorRT has no fused kernel for is allowed to fall apart into products and a softmax.

    TRT_Attention(float32)  →  TRT_Attention(float32, TRT_decomposable=1)

Without the mark an engine with float32 attention, or with a head size outside 16 to 256, does not build.
"""

import onnx_graphsurgeon as gs

from surgery.graph import Graph, is_half, static_dim

FUSED_HEAD_DIMS = range(16, 257)


def run(graph: Graph) -> int:
    return graph.match(_mark, graph.nodes("TRT_Attention"))


def _mark(graph: Graph, attention: gs.Node) -> bool:
    query, keys = attention.inputs[:2]
    if is_half(query) and static_dim(keys, 3) in FUSED_HEAD_DIMS:
        return False
    attention.attrs["TRT_decomposable"] = 1
    return True

"""Attention that TensorRT has no fused kernel for is allowed to fall apart into products and a softmax.

    TRT_Attention(float32)  →  TRT_Attention(float32, TRT_decomposable=1)

Without the mark an engine with float32 attention, with a head_dim outside 16 to 256, or that takes one token with fewer
than four query heads, does not build (TensorRT-RTX 1.7; measured for compute capabilities 8.6, 8.9 and 12.0).
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, is_half, static_dim

FUSED_HEAD_DIMS = range(16, 257)
LEAST_HEADS = 4  # of the query; the kernel for one token has no form for fewer


def run(graph: Graph) -> int:
    return graph.match(_mark, graph.nodes("TRT_Attention"))


def _mark(graph: Graph, attention: gs.Node) -> bool:
    query, keys = inputs_of(attention, "query", "key")
    heads, size = static_dim(query, 1), static_dim(keys, 3)
    enough = heads is None or heads >= LEAST_HEADS
    if is_half(query) and size in FUSED_HEAD_DIMS and enough:
        return False
    attention.attrs["TRT_decomposable"] = 1
    if is_half(query):
        why = f"a head_dim of {size}" if enough else f"{heads} query heads, fewer than {LEAST_HEADS}"
        graph.notes.append(f"{attention.name} may be taken apart: TensorRT has no fused attention for {why}")
    return True

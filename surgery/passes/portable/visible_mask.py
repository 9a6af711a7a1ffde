"""Attention that onnxruntime's CUDA provider computes wrongly gets a mask that hides nothing.

    Attention(Q, K, V)   →   Attention(Q, K, V, ConstantOfShape([S, L], true))        S: queries, L: keys

Without a mask its flash attention is wrong for some sizes of heads in half precision, by as much as the values; with one the
provider takes another kernel, which is right. The table in core/cuda_kernels.json has the sizes. The lowering takes the mask
out again.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.cuda_kernels import attention_is_wrong
from suture.surgery.graph import Graph, input_of, need, onnx_type, op_of, rank, static_dim

KNOWN = ("Q", "K", "V", "scale", "softcap", "q_num_heads", "kv_num_heads", "softmax_precision")


def run(graph: Graph) -> int:
    masks: dict[tuple, gs.Tensor] = {}
    return graph.match(lambda graph, node: _mask(graph, node, masks), graph.nodes("Attention"))


def _mask(graph: Graph, attention: gs.Node, masks: dict[tuple, gs.Tensor]) -> bool:
    heads = wrong_heads(attention)
    if heads is None:
        return False
    graph.need_known(attention, *KNOWN)
    query, keys = attention.inputs[:2]
    need(not attention_is_wrong(onnx_type(query), *heads, masked=True), "it is wrong with a mask, too")
    axis = rank(query) - 2
    sizes = [static_dim(tensor, axis) for tensor in (query, keys)]
    shared = tuple(size or id(tensor) for size, tensor in zip(sizes, (query, keys)))
    if shared not in masks:
        masks[shared] = _visible(graph, [_length(graph, tensor, axis) for tensor in (query, keys)], sizes)
    attention.inputs = [*attention.inputs[:3], masks[shared]]
    return True


def wrong_heads(attention: gs.Node) -> tuple[int, bool] | None:
    """head_dim, and whether heads share keys, of an Attention that the provider computes wrongly as it stands."""
    if op_of(attention) != "Attention":
        return None
    query, keys = attention.inputs[:2]
    if rank(query) == 4:
        head_dim, heads, kv_heads = static_dim(query, 3), static_dim(query, 1), static_dim(keys, 1)
    else:
        heads, kv_heads = attention.attrs.get("q_num_heads"), attention.attrs.get("kv_num_heads")
        head_dim = (static_dim(query, 2) or 0) // heads if heads else None
    causal, masked = bool(attention.attrs.get("is_causal")), input_of(attention, "attn_mask") is not None
    grouped = heads != kv_heads
    return (head_dim, grouped) if attention_is_wrong(onnx_type(query), head_dim, grouped, causal, masked) else None


def _length(graph: Graph, tensor: gs.Tensor, axis: int) -> gs.Tensor:
    """[1], how many tokens it has."""
    size = static_dim(tensor, axis)
    if size is not None:
        return graph.int64([size])
    return graph.new("Shape", [tensor], {"start": axis, "end": axis + 1}, dtype=np.int64, shape=[1])


def _visible(graph: Graph, lengths: list[gs.Tensor], sizes: list[int | None]) -> gs.Tensor:
    if None in sizes:
        shape = graph.new("Concat", lengths, {"axis": 0}, dtype=np.int64, shape=[2])
    else:
        shape = graph.int64(sizes)
    value = gs.Constant("value", np.ones(1, bool))
    return graph.new("ConstantOfShape", [shape], {"value": value}, name="visible", dtype=bool, shape=sizes)

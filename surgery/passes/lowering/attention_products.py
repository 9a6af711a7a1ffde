"""Attention that TensorRT has no operator for becomes products and a softmax.

    Attention(query, keys, values, softcap)  →  softmax(softcap * tanh(query * scale @ keys^T / softcap) + bias) @ values

So do heads whose values have another size than their keys, and a half-precision softmax of another type. Query heads lie
beside the key head that they share, [B, kv_heads, group, S, D] against [B, kv_heads, 1, T, D]: no key or value is repeated.
"""

import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, inputs_of, need, onnx_type, rank, static_dim
from suture.surgery.passes.lowering.attention_bias import Masks, bias
from suture.surgery.passes.lowering.attention_mask import scale_of, scaled

KNOWN = ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen", "scale",
         "is_causal", "softcap", "softmax_precision", "qk_matmul_output_mode")  # fmt: skip


def run(graph: Graph) -> int:
    masks = Masks.of(graph)
    return graph.match(lambda graph, node: _apart(graph, node, masks), graph.nodes("Attention"))


def _apart(graph: Graph, attention: gs.Node, masks: Masks) -> bool:
    query, keys, values = inputs_of(attention, "Q", "K", "V")
    softcap, dtype = attention.attrs.get("softcap", 0.0), onnx_type(query)
    precision = attention.attrs.get("softmax_precision", 0) or dtype
    precision = dtype if dtype == TensorProto.FLOAT else precision  # what is narrower than it comes from does not count
    sizes = static_dim(query, 3), static_dim(values, 3)
    if not softcap and precision == dtype and (None in sizes or sizes[0] == sizes[1]):
        return False
    graph.need_known(attention, *KNOWN)
    need(rank(query) == rank(keys) == rank(values) == 4, f"its query has rank {rank(query)}")
    heads, kv_heads = static_dim(query, 1), static_dim(keys, 1)
    need(heads and kv_heads and static_dim(values, 1) == kv_heads, "the numbers of its heads are not known")
    need(all(sizes), "the sizes of its heads are not known")
    name, group = attention.name, heads // kv_heads
    added = bias(graph, attention, masks)
    query = scaled(graph, query, scale_of(attention))
    perm = [0, 1, 3, 2]
    if group > 1:
        query = graph.new("Reshape", [query, graph.int64([0, kv_heads, group, -1, sizes[0]])], name=f"{name}/groups")
        keys, values = (graph.new("Unsqueeze", [x, graph.int64([2])], name=f"{name}/shared") for x in (keys, values))
        added = added if added is None else _for_groups(graph, added, kv_heads, group, name)
        perm = [0, 1, 2, 4, 3]
    keys = graph.new("Transpose", [keys], {"perm": perm}, f"{name}/keys")
    scores = graph.new("MatMul", [query, keys], name=f"{name}/scores")
    if softcap:
        cap = graph.number(softcap, dtype)
        scores = graph.new("Tanh", [graph.new("Div", [scores, cap], name=f"{name}/softcap")], name=f"{name}/softcap")
        scores = graph.new("Mul", [scores, cap], name=f"{name}/softcap")
    if added is not None:
        scores = graph.new("Add", [scores, added], name=f"{name}/masked")
    if precision != dtype:
        scores = graph.new("Cast", [scores], {"to": precision}, f"{name}/wide", precision)
    weights = graph.new("Softmax", [scores], {"axis": -1}, f"{name}/softmax")
    if precision != dtype:
        weights = graph.new("Cast", [weights], {"to": dtype}, f"{name}/weights", dtype)
    result = attention.outputs[0]
    if group == 1:
        graph.replace(result, "MatMul", [weights, values], name=f"{name}/context")
        return True
    context = graph.new("MatMul", [weights, values], name=f"{name}/context")
    graph.replace(result, "Reshape", [context, graph.int64([0, heads, -1, sizes[1]])], name=f"{name}/heads")
    return True


def _for_groups(graph: Graph, bias: gs.Tensor, kv_heads: int, group: int, name: str) -> gs.Tensor:
    """What is added to scores [B, H, S, T], over [B, kv_heads, group, S, T]."""
    of_heads = static_dim(bias, 1)
    need(of_heads in (1, kv_heads * group), "for how many heads its mask is, is not known")
    if of_heads == 1:
        return graph.new("Unsqueeze", [bias, graph.int64([1])], name=f"{name}/bias")
    split = graph.new("Transpose", [bias], {"perm": [0, 2, 3, 1]}, f"{name}/bias")  # one -1 is not enough for S and T
    split = graph.new("Reshape", [split, graph.int64([0, 0, 0, kv_heads, group])], name=f"{name}/bias")
    return graph.new("Transpose", [split], {"perm": [0, 3, 4, 1, 2]}, f"{name}/bias")

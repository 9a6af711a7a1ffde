"""Attention over one key is its value: the softmax of a single score is 1.

    Attention(query [B, heads, S, D], key [B, heads, 1, D], value [B, heads, 1, V])  →  value, for each of S queries

TensorRT's compiler fails on an attention of one query and one key; and what made query and key is dropped with it.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, need, rank, static_dim

KNOWN = ("Q", "K", "V", "scale", "softcap", "softmax_precision")


def run(graph: Graph) -> int:
    return graph.match(_value, graph.nodes("Attention"))


def _value(graph: Graph, attention: gs.Node) -> bool:
    query, key, value = inputs_of(attention, "Q", "K", "V")
    if rank(query) != 4 or rank(key) != 4 or static_dim(key, 2) != 1:
        return False
    graph.need_known(attention, *KNOWN)
    queries, heads = static_dim(query, 2), static_dim(query, 1)
    need(queries is not None, "the number of queries is not fixed")
    need(heads is not None and static_dim(value, 1) == heads, "query heads share their values")
    result = attention.outputs[0]
    if queries == 1:
        graph.replace(result, "Identity", [value])
    else:
        graph.replace(result, "Expand", [value, graph.int64([1, 1, queries, 1])])
    return True

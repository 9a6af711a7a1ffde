"""MultiHeadAttention becomes Attention over heads first, the cache a Concat outside.

    MultiHeadAttention(q, k, v, b, key_padding_mask, attention_bias, past_k, past_v)
        →  Attention(heads(q + b_q), concat(past_k, heads(k + b_k)), concat(past_v, heads(v + b_v)), mask)

q, k and v may come side by side ([B, S, heads, 3, D], or k and v as [B, T, heads, 2, D]), or k and v as a cache
[B, heads, T, D] that an encoder filled. The mask is what of these there is: the bias; where a bool mask hides, whether for
padding ([B, T], [B, S, T]) or because the op is unidirectional, a large negative number instead of it.

Of a unidirectional one there must be as many new keys as queries: else rows may see nothing, and onnxruntime's providers count
from different ends.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, output_of, rank, static_dim
from suture.surgery.passes.import_contrib.attentions import attend, grown, mask_of, refuse_weak_masks, split
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, heads_first, refuse_inputs, refuse_outputs
from suture.surgery.rows import same_length


def run(graph: Graph) -> int:
    made: dict[int, gs.Tensor] = {}
    return graph.match(lambda graph, node: _standard(graph, node, made), contrib_nodes(graph, "MultiHeadAttention"))


def _standard(graph: Graph, node: gs.Node, made: dict[int, gs.Tensor]) -> bool:
    refuse_inputs(node, "past_sequence_length", "cache_indirection")
    refuse_outputs(graph, node, "qk")
    refuse_weak_masks(node)
    padding, bias = input_of(node, "key_padding_mask"), input_of(node, "attention_bias")
    need(padding is None or rank(padding) in (2, 3), "its padding is given as lengths")
    causal = bool(node.attrs.get("unidirectional", 0))
    need(not causal or _one_key_a_query(graph, node), "it is unidirectional over other keys than its queries' own")
    query, key, value = _projections(graph, node, node.attrs["num_heads"])
    pasts = inputs_of(node, "past_key", "past_value")
    presents = [output_of(node, name) for name in ("present_key", "present_value")]
    key, value = (grown(graph, *each, node.name) for each in zip(pasts, (key, value), presents))
    top_left = causal and all(each is None for each in (pasts[0], padding, bias))
    mask = None if top_left else mask_of(graph, query, key, padding, bias, causal, made)
    attend(graph, node, (query, key, value), mask, top_left)
    return True


def _one_key_a_query(graph: Graph, node: gs.Node) -> bool:
    query, key = input_of(node, "query"), input_of(node, "key")
    return key is None or same_length(graph, (query, 1), (key, 2 if rank(key) == 4 else 1))


def _projections(graph: Graph, node: gs.Node, heads: int) -> list[gs.Tensor]:
    """Query, key and value, each [B, heads, S or T, head_dim], their biases added."""
    query, key, value, bias = inputs_of(node, "query", "key", "value", "bias")
    if rank(query) == 5:
        need(bias is None, "it adds a bias to a packed projection")
        return [_unpacked(graph, query, index, f"{node.name}/{side}") for index, side in enumerate("qkv")]
    need(rank(query) == 3 and key is not None, f"its query has rank {rank(query)}, not 3 or 5")
    hidden = static_dim(query, 2)
    need(hidden and hidden % heads == 0, f"{hidden} features do not divide into {heads} heads")
    if rank(key) == 5 or rank(key) == 4:
        need(bias is None or rank(key) == 4, "it adds a bias to keys that are packed")
        if bias is not None:  # cached keys and values have theirs already
            bias = graph.new(
                "Slice", [bias, *map(graph.int64, ([0], [hidden], [0]))], name=f"{node.name}/q_bias", shape=[hidden]
            )
            query = graph.new("Add", [query, bias], name=f"{node.name}/bias", shape=query.shape)
        first = heads_first(graph, query, heads, hidden // heads, f"{node.name}/q")
        if rank(key) == 4:
            sizes = [static_dim(x, axis) for x in (key, value) for axis in (1, 3)]
            need(None not in sizes, "the sizes of its cached keys and values are not known")
            return [first, key, value]
        return [first, *(_unpacked(graph, key, index, f"{node.name}/{side}") for index, side in enumerate("kv"))]
    value_hidden = static_dim(value, 2)
    need(static_dim(key, 2) == hidden, "the size of its keys is not known, or not that of its queries")
    need(value_hidden and value_hidden % heads == 0, f"{value_hidden} features do not divide into {heads} heads")
    parts, sizes = [query, key, value], [hidden, hidden, value_hidden]
    if bias is not None:
        biases = split(graph, bias, sizes, [], f"{node.name}/bias")
        parts = [graph.new("Add", [x, b], name=f"{node.name}/bias", shape=x.shape) for x, b in zip(parts, biases)]
    return [heads_first(graph, x, heads, n // heads, f"{node.name}/{side}") for x, n, side in zip(parts, sizes, "qkv")]


def _unpacked(graph: Graph, packed: gs.Tensor, index: int, name: str) -> gs.Tensor:
    """One of [B, S, heads, n, D], as [B, heads, S, D]."""
    batch, steps, heads, _, dim = packed.shape
    need(isinstance(heads, int) and isinstance(dim, int), "the sizes of a packed projection are not known")
    part = graph.new("Gather", [packed, graph.int64(index)], {"axis": 3}, name, shape=[batch, steps, heads, dim])
    return graph.new("Transpose", [part], {"perm": [0, 2, 1, 3]}, f"{name}/transpose", shape=[batch, heads, steps, dim])

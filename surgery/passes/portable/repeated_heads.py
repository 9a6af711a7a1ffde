"""Keys and values repeated for grouped queries are not repeated: Attention groups query heads itself.

    Attention(query, repeat(key, n), repeat(value, n)) = Attention(query, key, value)     heads = n * kv_heads

Repeating is Unsqueeze of axis 2, Expand, and Reshape to four dimensions: head h of the result is head h / n of the source.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, need, producer, rank, set_inputs, static_dim

KNOWN = ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen", "scale",
         "is_causal", "softcap", "softmax_precision", "qk_matmul_output_mode")  # fmt: skip


def run(graph: Graph) -> int:
    return graph.match(_native, graph.nodes("Attention"))


def _native(graph: Graph, attention: gs.Node) -> bool:
    query, key, value = inputs_of(attention, "Q", "K", "V")
    sources = [source_of(graph, tensor) for tensor in (key, value)]
    repeated = [source is not None for source in sources]
    if not any(repeated):
        return False
    graph.need_known(attention, *KNOWN)
    need(all(repeated), "only one of key and value is repeated")
    heads = static_dim(query, 1)
    kv_heads = [static_dim(source, 1) for source in sources]
    need(heads and kv_heads[0] and kv_heads[0] == kv_heads[1], "the number of heads is not known")
    need(all(static_dim(each, 1) in (None, heads) for each in (key, value)), "repeated heads are not the query's")
    need(heads % kv_heads[0] == 0, f"{heads} query heads do not divide into {kv_heads[0]} groups")
    set_inputs(attention, K=sources[0], V=sources[1])
    return True


def source_of(graph: Graph, tensor: gs.Tensor) -> gs.Tensor | None:
    """What keys or values of four dimensions repeat for grouped queries; None if they repeat nothing."""
    reshape = producer(tensor, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if unsqueeze is None or rank(tensor) != 4 or rank(unsqueeze.inputs[0]) != 4:
        return None
    axes = graph.constant(unsqueeze.inputs[1])
    return unsqueeze.inputs[0] if axes is not None and axes.tolist() in ([2], [-3]) else None

"""MultiHeadAttention becomes Attention over heads first, the cache a Concat outside.

    MultiHeadAttention(q, k, v, b, key_padding_mask, attention_bias, past_k, past_v)
        →  Attention(heads(q + b_q), concat(past_k, heads(k + b_k)), concat(past_v, heads(v + b_v)), mask)

q, k and v may come side by side ([B, S, heads, 3, D], or k and v as [B, T, heads, 2, D]), or k and v as a cache
[B, heads, T, D] that an encoder filled. The mask is what of these there is: the bias; where a bool mask hides, whether for
padding ([B, T], [B, S, T]) or because the op is unidirectional, a large negative number instead of it.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, onnx_type, rank, static_dim
from suture.surgery.passes.import_contrib.grouped_query_attention import BOOL, grown, lower_right
from suture.surgery.passes.import_contrib.nodes import (
    contrib_nodes,
    heads_first,
    merge_heads,
    optional,
    optional_output,
    refuse_inputs,
    refuse_outputs,
)


def run(graph: Graph) -> int:
    made: dict[int, gs.Tensor] = {}
    return graph.match(lambda graph, node: _standard(graph, node, made), contrib_nodes(graph, "MultiHeadAttention"))


def _standard(graph: Graph, node: gs.Node, made: dict[int, gs.Tensor]) -> bool:
    refuse_inputs(node, (8, "past_sequence_length"), (9, "cache_indirection"))
    refuse_outputs(graph, node, (3, "qk"))
    padding = optional(node, 4)
    need(padding is None or rank(padding) in (2, 3), "its padding is given as lengths")
    heads, name, result = node.attrs["num_heads"], node.name, node.outputs[0]
    query, key, value = _projections(graph, node, heads)
    dim, value_dim = query.shape[3], value.shape[3]
    pasts = [optional(node, 6), optional(node, 7)]
    presents = [optional_output(node, 1), optional_output(node, 2)]
    key, value = (grown(graph, past, new, present, name) for past, new, present in zip(pasts, (key, value), presents))
    bias, causal = optional(node, 5), bool(node.attrs.get("unidirectional", 0))
    top_left = causal and pasts[0] is None and padding is None and bias is None
    mask = None if top_left else mask_of(graph, query, key, padding, bias, causal, made)
    attrs = {"scale": node.attrs.get("scale", 0.0) or dim**-0.5} | ({"is_causal": 1} if top_left else {})
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    context = graph.new("Attention", inputs, attrs, name, onnx_type(query), [*query.shape[:3], value_dim])
    merge_heads(graph, context, result, heads, value_dim, name)
    return True


def _projections(graph: Graph, node: gs.Node, heads: int) -> list[gs.Tensor]:
    """Query, key and value, each [B, heads, S or T, head_dim], their biases added."""
    query, key, value, bias = node.inputs[0], optional(node, 1), optional(node, 2), optional(node, 3)
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
        biases = [gs.Variable(graph.unique(f"{node.name}/{x}_bias"), onnx_type(bias), [n]) for x, n in zip("qkv", sizes)]
        graph.gs.nodes.append(gs.Node("Split", f"{node.name}/bias", {"axis": 0}, [bias, graph.int64(sizes)], biases))
        parts = [graph.new("Add", [x, b], name=f"{node.name}/bias", shape=x.shape) for x, b in zip(parts, biases)]
    return [heads_first(graph, x, heads, n // heads, f"{node.name}/{side}") for x, n, side in zip(parts, sizes, "qkv")]


def _unpacked(graph: Graph, packed: gs.Tensor, index: int, name: str) -> gs.Tensor:
    """One of [B, S, heads, n, D], as [B, heads, S, D]."""
    batch, steps, heads, _, dim = packed.shape
    need(isinstance(heads, int) and isinstance(dim, int), "the sizes of a packed projection are not known")
    part = graph.new("Gather", [packed, graph.int64(index)], {"axis": 3}, name, shape=[batch, steps, heads, dim])
    return graph.new("Transpose", [part], {"perm": [0, 2, 1, 3]}, f"{name}/transpose", shape=[batch, heads, steps, dim])


def mask_of(
    graph: Graph, query: gs.Tensor, keys: gs.Tensor, padding: gs.Tensor | None, bias: gs.Tensor | None, causal: bool,
    made: dict[int, gs.Tensor],
) -> gs.Tensor | None:  # fmt: skip
    """[B or 1, heads or 1, S, T]: bool, or float where there is a bias; None where nothing is masked."""
    visible = None
    if padding is not None:
        if id(padding) not in made:
            made[id(padding)] = _not_padding(graph, padding, query)
        visible = made[id(padding)]
    if causal:
        below = _causal(graph, query, keys)
        visible = below if visible is None else graph.new("And", [visible, below], name="mask/visible", dtype=np.bool_)
    if visible is None or bias is None:
        return visible if bias is None else bias
    lowest = graph.number(-6e4 if onnx_type(bias) == onnx.TensorProto.FLOAT16 else -1e30, onnx_type(bias))
    return graph.new("Where", [visible, bias, lowest], name="mask/bias", dtype=onnx_type(bias))


def _not_padding(graph: Graph, padding: gs.Tensor, query: gs.Tensor) -> gs.Tensor:
    """bool [B, 1, S, T]; onnxruntime takes no mask whose third size is 1 for all S."""
    real = graph.new("Cast", [padding], {"to": BOOL}, "mask/real", np.bool_, padding.shape)
    if rank(padding) == 3:
        return graph.new("Unsqueeze", [real, graph.int64([1])], name="mask/real")
    real = graph.new("Unsqueeze", [real, graph.int64([1, 2])], name="mask/real")
    steps = graph.new("Shape", [query], {"start": 2, "end": 3}, "mask/steps", np.int64, [1])
    shape = graph.new("Concat", [graph.int64([1, 1]), steps, graph.int64([1])], {"axis": 0}, "mask/shape", np.int64, [4])
    return graph.new("Expand", [real, shape], name="mask/real")


def _causal(graph: Graph, query: gs.Tensor, keys: gs.Tensor) -> gs.Tensor:
    """bool [S, T]: the last token of the step sees all slots."""
    steps = graph.new("Shape", [query], {"start": 2, "end": 3}, "mask/steps", np.int64, [1])
    total = graph.new("Shape", [keys], {"start": 2, "end": 3}, "mask/total", np.int64, [1])
    past = graph.new("Sub", [total, steps], name="mask/past", dtype=np.int64, shape=[1])
    return lower_right(graph, past, steps, total)

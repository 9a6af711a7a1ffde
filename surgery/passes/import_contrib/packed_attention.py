"""onnxruntime's Attention, which has its own projection, becomes a product, heads apart, and the standard Attention.

    Attention(x, w, b, mask_index, past, bias)  →  q, k, v = split(x @ w + b)
        Attention(heads(q), concat(past[0], heads(k)), concat(past[1], heads(v)), mask)
    present = stack(keys, values)                       a stacked past [2, B, heads, P, D] stays as it is outside

The mask is made of what there is: the bias; padding as [B, T], as [B, S, T], or as each row's length [B]; causality where
the op is unidirectional, counted from the past's end.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, output_of, producer, rank, static_dim
from suture.surgery.masks.mask_builders import count_up, length_of
from suture.surgery.passes.import_contrib.attentions import attend, grown, mask_of, split
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, heads_first, refuse_inputs


def run(graph: Graph) -> int:
    made: dict[int, gs.Tensor] = {}
    return graph.match(lambda graph, node: _standard(graph, node, made), contrib_nodes(graph, "Attention"))


def _standard(graph: Graph, node: gs.Node, made: dict[int, gs.Tensor]) -> bool:
    refuse_inputs(node, "past_sequence_length")
    need(not node.attrs.get("do_rotary", 0), "it rotates queries and keys")
    need(not node.attrs.get("past_present_share_buffer", 0), "its past and present are one buffer")
    x, weights, name, heads = input_of(node, "input"), input_of(node, "weights"), node.name, node.attrs["num_heads"]
    columns = static_dim(weights, 1)
    need(rank(x) == 3 and columns, "the size of its projection is not known")
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", [])] or [columns // 3] * 3
    need(
        sum(sizes) == columns and not any(size % heads for size in sizes), f"{sizes} features do not divide into {heads} heads"
    )
    query, key, value = _projections(graph, node, sizes, heads)
    past, present = input_of(node, "past"), output_of(node, "present")
    pasts = [None, None] if past is None else [_part(graph, past, index, name) for index in (0, 1)]
    key, value = (grown(graph, before, new, None, name) for before, new in zip(pasts, (key, value)))
    if present is not None:
        parts = [graph.new("Unsqueeze", [x, graph.int64([0])], name=f"{name}/stack") for x in (key, value)]
        graph.replace(present, "Concat", parts, {"axis": 0}, f"{name}/present")
    padding, bias = input_of(node, "mask_index"), input_of(node, "attention_bias")
    causal = bool(node.attrs.get("unidirectional", 0))
    if padding is not None and rank(padding) == 1:
        padding = _valid(graph, padding, x, key, made)
    need(padding is None or rank(padding) in (2, 3), "its mask has neither one, two nor three axes")
    top_left = causal and past is None and padding is None and bias is None
    mask = None if top_left else mask_of(graph, query, key, padding, bias, causal, made)
    attend(graph, node, (query, key, value), mask, top_left)
    return True


def _projections(graph: Graph, node: gs.Node, sizes: list[int], heads: int) -> list[gs.Tensor]:
    """Query, key and value, each [B, heads, S, head_dim]."""
    x, weights, bias = inputs_of(node, "input", "weights", "bias")
    name = node.name
    shape = [*x.shape[:2], sum(sizes)]
    packed = graph.new("MatMul", [x, weights], name=f"{name}/qkv", shape=shape)
    if bias is not None:
        packed = graph.new("Add", [packed, bias], name=f"{name}/qkv_bias", shape=shape)
    parts = split(graph, packed, sizes, list(x.shape[:2]), name)
    return [heads_first(graph, x, heads, n // heads, f"{name}/{side}") for x, n, side in zip(parts, sizes, "qkv")]


def _part(graph: Graph, past: gs.Tensor, index: int, name: str) -> gs.Tensor:
    """The keys, or the values, of a past [2, B, heads, P, D]."""
    need(rank(past) == 5, "its past is not stacked from keys and values")
    return graph.new("Gather", [past, graph.int64(index)], {"axis": 0}, f"{name}/past", shape=list(past.shape[1:]))


def _valid(graph: Graph, lengths: gs.Tensor, x: gs.Tensor, keys: gs.Tensor, made: dict[int, gs.Tensor]) -> gs.Tensor:
    """bool [B, T]: the slots before each row's length."""
    batch = static_dim(x, 0)
    of_rows = producer(lengths, "ReduceSum") is not None or (batch is not None and static_dim(lengths, 0) == batch)
    need(of_rows, "its mask of one axis cannot be shown to hold one length a row")
    if id(lengths) not in made:
        slots = count_up(graph, length_of(graph, keys, 2, "mask/total"), "mask/slots")
        ends = graph.new("Cast", [lengths], {"to": 7}, "mask/lengths", np.int64, lengths.shape)
        ends = graph.new("Unsqueeze", [ends, graph.int64([1])], name="mask/lengths", shape=[lengths.shape[0], 1])
        made[id(lengths)] = graph.new("Less", [slots, ends], name="mask/valid", dtype=np.bool_, shape=[lengths.shape[0], None])
    return made[id(lengths)]

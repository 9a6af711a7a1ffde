"""onnxruntime's Attention, which has its own projection, becomes a product, heads apart, and the standard Attention.

    Attention(x, w, b, mask_index, past, bias)  →  q, k, v = split(x @ w + b)
        Attention(heads(q), concat(past[0], heads(k)), concat(past[1], heads(v)), mask)
    present = stack(keys, values)                       a stacked past [2, B, heads, P, D] stays as it is outside

The mask is made of what there is: the bias; padding as [B, T], as [B, S, T], or as one axis: each row's length [B], its end
and its first slot [2B], or its length and two running sums [3B + 2]; causality where the op is unidirectional, counted from
the past's end.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, inputs_of, need, output_of, producer, rank, static_dim
from suture.surgery.masks.mask_builders import count_up, length_of
from suture.surgery.passes.import_contrib.attentions import attend, grown, mask_of, refuse_weak_masks, split
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, heads_first, refuse_inputs


def run(graph: Graph) -> int:
    made: dict[int, gs.Tensor] = {}
    return graph.match(lambda graph, node: _standard(graph, node, made), contrib_nodes(graph, "Attention"))


def _standard(graph: Graph, node: gs.Node, made: dict[int, gs.Tensor]) -> bool:
    refuse_inputs(node, "past_sequence_length")
    refuse_weak_masks(node)
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
    """bool [B, T]: the slots before each row's length, and from its first on where a mask [2B] says which that is."""
    if id(lengths) not in made:
        batch = static_dim(x, 0)
        of_rows = producer(lengths, "ReduceSum") is not None or (batch is not None and static_dim(lengths, 0) == batch)
        ends, starts = (lengths, None) if of_rows else _ends_and_starts(graph, lengths, x)
        slots = count_up(graph, length_of(graph, keys, 2, "mask/total"), "mask/slots")
        valid = graph.new("Less", [slots, _column(graph, ends, x)], name="mask/valid", dtype=np.bool_, shape=[x.shape[0], None])
        if starts is not None:
            begun = graph.new("LessOrEqual", [_column(graph, starts, x), slots], name="mask/begun", dtype=np.bool_)
            valid = graph.new("And", [begun, valid], name="mask/valid", dtype=np.bool_, shape=[x.shape[0], None])
        made[id(lengths)] = valid
    return made[id(lengths)]


def _column(graph: Graph, numbers: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """int64 [B, 1]."""
    wide = graph.new("Cast", [numbers], {"to": 7}, "mask/lengths", np.int64, numbers.shape)
    return graph.new("Unsqueeze", [wide, graph.int64([1])], name="mask/lengths", shape=[x.shape[0], 1])


def _ends_and_starts(graph: Graph, mask: gs.Tensor, x: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """int32 [B] each: where a row's slots end, and where they begin, of a mask [B], [2B] (ends, then starts) or [3B + 2]
    (ends, then two running sums). Which it is, its length says when it runs: the starts are 0 but for [2B]."""
    rows = graph.new("Shape", [x], {"start": 0, "end": 1}, "mask/rows", np.int64, [1])
    twice = graph.new("Add", [rows, rows], name="mask/twice", dtype=np.int64, shape=[1])
    count = graph.new("Shape", [mask], {"start": 0, "end": 1}, "mask/count", np.int64, [1])
    ends = graph.new("Slice", [mask, graph.int64([0]), rows, graph.int64([0])], name="mask/ends", shape=[x.shape[0]])
    none = graph.new("Sub", [ends, ends], name="mask/none", shape=[x.shape[0]])
    filled = graph.new("Concat", [mask, none], {"axis": 0}, "mask/filled", shape=[None])
    starts = graph.new("Slice", [filled, rows, twice, graph.int64([0])], name="mask/starts", shape=[x.shape[0]])
    said = graph.new("Equal", [count, twice], name="mask/said", dtype=np.bool_, shape=[1])
    return ends, graph.new("Where", [said, starts, none], name="mask/starts", shape=[x.shape[0]])

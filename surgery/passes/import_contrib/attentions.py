"""What onnxruntime's attentions have in common: projections apart, caches that grow, masks, and the standard Attention that
each becomes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.core.additive_mask import FAR_BELOW
from suture.surgery.graph import Graph, need, onnx_type, rank
from suture.surgery.masks.mask_builders import both, length_of, lower_right
from suture.surgery.passes.import_contrib.nodes import merge_heads


def refuse_weak_masks(node: gs.Node) -> None:
    """Raises NoMatch where what its masks hide would count still."""
    hides = node.attrs.get("mask_filter_value", FAR_BELOW)
    need(hides <= FAR_BELOW, f"what its mask hides gets {hides} added, which counts still")


def split(graph: Graph, packed: gs.Tensor, sizes: Sequence[int], rows: list, name: str) -> list[gs.Variable]:
    """Query, key and value of what has them side by side on the last axis; `rows`: its axes before."""
    parts = [gs.Variable(graph.unique(f"{name}/{side}"), onnx_type(packed), [*rows, size]) for side, size in zip("qkv", sizes)]
    graph.gs.nodes.append(gs.Node("Split", f"{name}/split", {"axis": -1}, [packed, graph.int64(list(sizes))], parts))
    return parts


def grown(graph: Graph, past: gs.Tensor | None, new: gs.Tensor, present: gs.Variable | None, name: str) -> gs.Tensor:
    """concat(past, new) over slots, which is the output `present` where there is one; `new` where nothing is cached."""
    sizes = (new.shape[1], new.shape[3])
    for cache in (past, present):
        if cache is not None and rank(cache) == 4:  # exporters leave the width of a head open
            cache.shape = [cache.shape[0], sizes[0], cache.shape[2], sizes[1]]
    if present is not None and rank(present) != 4:
        present.shape = [new.shape[0], sizes[0], None, sizes[1]]
    if past is None:
        if present is None:
            return new
        graph.replace(present, "Identity", [new], name=f"{name}/cache")
        return new
    _note_sizes(graph, past, *sizes)
    if present is None:
        shape = [new.shape[0], sizes[0], "total", sizes[1]]
        return graph.new("Concat", [past, new], {"axis": 2}, f"{name}/cache", onnx_type(new), shape)
    graph.replace(present, "Concat", [past, new], {"axis": 2}, name=f"{name}/cache")
    return present


def _note_sizes(graph: Graph, past: gs.Tensor, kv_heads: int, head_dim: int) -> None:
    caches = graph.signature.caches
    if caches and caches[0].past == past.name:
        graph.signature = replace(graph.signature, kv_heads=kv_heads, head_dim=head_dim)


def attend(
    graph: Graph,
    node: gs.Node,
    operands: tuple[gs.Tensor, gs.Tensor, gs.Tensor],
    mask: gs.Tensor | None,
    is_causal: bool = False,
) -> None:
    """Makes the first output of `node`, [B, S, heads * head_dim], of query, key and value [B, their heads, S or T, head_dim]."""
    query, key, value = operands
    attrs = {"scale": node.attrs.get("scale", 0.0) or query.shape[3] ** -0.5} | ({"is_causal": 1} if is_causal else {})
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    heads, value_dim = query.shape[1], value.shape[3]
    context = graph.new("Attention", inputs, attrs, node.name, onnx_type(query), [*query.shape[:3], value_dim])
    merge_heads(graph, context, node.outputs[0], heads, value_dim, node.name)


def mask_of(
    graph: Graph,
    query: gs.Tensor,
    keys: gs.Tensor,
    padding: gs.Tensor | None,
    bias: gs.Tensor | None,
    causal: bool,
    made: dict[int, gs.Tensor],
) -> gs.Tensor | None:
    """[B or 1, heads or 1, S, T]: bool, or float where there is a bias; None where nothing is masked. `made`: what padding
    became, by its id."""
    visible = None
    if padding is not None:
        if id(padding) not in made:
            made[id(padding)] = _not_padding(graph, padding, query)
        visible = made[id(padding)]
    if causal:
        visible = both(graph, _causal(graph, query, keys), visible)
    return bias if visible is None else both(graph, visible, bias)


def _not_padding(graph: Graph, padding: gs.Tensor, query: gs.Tensor) -> gs.Tensor:
    """bool [B, 1, S, T]; onnxruntime takes no mask whose third size is 1 for all S."""
    real = graph.new("Cast", [padding], {"to": TensorProto.BOOL}, "mask/real", np.bool_, padding.shape)
    if rank(padding) == 3:
        return graph.new("Unsqueeze", [real, graph.int64([1])], name="mask/real")
    real = graph.new("Unsqueeze", [real, graph.int64([1, 2])], name="mask/real")
    steps = length_of(graph, query, 2, "mask/steps")
    shape = graph.new("Concat", [graph.int64([1, 1]), steps, graph.int64([1])], {"axis": 0}, "mask/shape", np.int64, [4])
    return graph.new("Expand", [real, shape], name="mask/real")


def _causal(graph: Graph, query: gs.Tensor, keys: gs.Tensor) -> gs.Tensor:
    """bool [S, T]: the last token of the step sees all slots."""
    steps = length_of(graph, query, 2, "mask/steps")
    total = length_of(graph, keys, 2, "mask/total")
    past = graph.new("Sub", [total, steps], name="mask/past", dtype=np.int64, shape=[1])
    return lower_right(graph, past, steps, total)

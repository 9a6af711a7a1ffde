"""Batch and heads of attention's operands: [B, heads, S, D], or merged into one axis as products of three dimensions have them."""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, onnx_type, producer, rank, static_dim


def unmerged(tensor: gs.Tensor) -> gs.Tensor:
    """[B, heads, S, D], if the tensor is that with its first two axes merged; else the tensor."""
    node = producer(tensor, "Reshape")
    return node.inputs[0] if rank(tensor) == 3 and node is not None and same_matrices(node.inputs[0], tensor) else tensor


def same_matrices(first: gs.Tensor, second: gs.Tensor) -> bool:
    """Whether two ranks of one tensor differ in the axes before the last two alone."""
    if rank(first) is None or rank(second) is None:
        return False
    sizes = list(first.shape[-2:])
    return sizes == list(second.shape[-2:]) and all(size is not None and size != "" for size in sizes)


def one_batch(graph: Graph, tensors: tuple[gs.Tensor, ...]) -> list[gs.Tensor]:
    """[1, N, S, D] of each [N, S, D]: batch and heads, however they are merged, as the heads of one batch."""
    counts = {tensor.shape[0] for tensor in tensors}
    need(
        len(counts) == 1 and not counts & {None, "", -1}, "batch and heads of query, key and value are not known to be as many"
    )
    return [graph.new("Unsqueeze", [tensor, graph.int64([0])], shape=[1, *tensor.shape]) for tensor in tensors]


def of_batch(graph: Graph, query: gs.Tensor, key: gs.Tensor) -> gs.Tensor:
    """Learned queries [1, heads, S, D] for each of the key's batch."""
    batch = graph.new("Shape", [key], {"start": 0, "end": 1}, dtype=np.int64, shape=[1])
    sizes = graph.new("Concat", [batch, graph.int64([1, 1, 1])], {"axis": 0}, dtype=np.int64, shape=[4])
    return graph.new("Expand", [query, sizes], shape=[key.shape[0], *query.shape[1:]])


def split(graph: Graph, merged: gs.Tensor, heads: gs.Tensor) -> gs.Variable:
    """[B·heads, x, y] as [B, heads, x, y], with B and heads of `heads` [B, heads, ...]."""
    target = sizes_of(graph, [-1, heads.shape[1]], merged, 1, [])
    return graph.new("Reshape", [merged, target], shape=[*heads.shape[:2], *merged.shape[1:]])


def heads_in_rows(graph: Graph, query: gs.Tensor, key: gs.Tensor) -> gs.Tensor | None:
    """[B, heads, S, D], if the query is that with the heads of a group as its rows, [B, kv_heads, group, D].

    Nothing is left for S then but 1: what a graph is that was traced with one token. Other steps it cannot run.
    """
    reshape = producer(query, "Reshape")
    heads = reshape.inputs[0] if reshape is not None else None
    if heads is None or rank(heads) != 4 or rank(key) != 4:
        return None
    (count, size), (kv_heads, group) = ([static_dim(heads, 1), static_dim(heads, 3)], [static_dim(query, i) for i in (1, 2)])
    if None in (count, size, kv_heads, group) or static_dim(query, 3) != size or static_dim(key, 1) != kv_heads:
        return None
    one_batch = heads.shape[0] == query.shape[0] not in (None, "", -1)
    return heads if group > 1 and count == kv_heads * group and one_batch else None


def heads_apart(graph: Graph, result: gs.Variable, grouped: gs.Tensor, shape: list) -> gs.Variable:
    """What is to be the context [B, heads, S, D] of `shape`, so that `result`, [B, kv_heads, group, D], is the same numbers."""
    joined = only_consumer(result, "Reshape")
    if joined is not None and rank(joined.outputs[0]) == 4 and list(joined.outputs[0].shape[2:]) == list(shape[2:]):
        return joined.outputs[0]
    context = gs.Variable(graph.unique(f"{result.name}/heads"), onnx_type(result), shape)
    _, kv_heads, group, _ = grouped.shape
    graph.replace(result, "Reshape", [context, graph.int64([0, kv_heads, group, shape[3] or -1])])
    return context


def sizes_of(graph: Graph, before: list[int], tensor: gs.Tensor, axis: int, after: list[int]) -> gs.Tensor:
    """`before`, the sizes of `tensor` from `axis` up to those of its last axes that `after` replaces, and `after`: int64."""
    end = rank(tensor) - len(after)
    known = [static_dim(tensor, each) for each in range(axis, end)]
    if None not in known:
        return graph.int64([*before, *known, *after])
    sizes = graph.new("Shape", [tensor], {"start": axis, "end": end}, dtype=np.int64, shape=[end - axis])
    parts = [graph.int64(before), sizes, *([graph.int64(after)] if after else [])]
    return graph.new("Concat", parts, {"axis": 0}, dtype=np.int64, shape=[len(before) + end - axis + len(after)])

"""Attention with a sink, a learned score a head that takes its part of the softmax and has no value (gpt-oss), in one form.

    scores = query @ key^T * scale + mask                             [B, heads, S, T]
    softmax(concat(scores, sink))[..., :-1] @ value                   sink: [B, heads, S, 1]

Attention has no input for it, so products stay; but a key head is read once for all the query heads of its group, which lie
below each other in the rows of one product, [B, kv_heads, group·S, head_dim], and none is repeated. Scores less their largest
are left out: a softmax is the same without. `place_of_mask` finds the mask again, which static_cache then makes over slots.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, last_axis, need, only_consumer, onnx_type, op_of, producer, rank, static_dim, through
from suture.surgery.masks.masks import BOOL
from suture.surgery.passes.portable.attention import scores_of, untransposed
from suture.surgery.passes.portable.repeated_heads import source_of


def run(graph: Graph) -> int:
    return graph.match(_write, graph.nodes("Softmax"))


def _write(graph: Graph, softmax: gs.Node) -> bool:
    joined = producer(_unreduced(graph, softmax.inputs[0]), "Concat")
    cut = only_consumer(softmax.outputs[0], "Slice")
    product = None if cut is None else only_consumer(cut.outputs[0], "MatMul")
    if joined is None or product is None or product.inputs[0] is not cut.outputs[0] or len(joined.inputs) != 2:
        return False
    written, column = joined.inputs
    if place_of_mask(graph, product) is not None or rank(column) != 4:
        return False
    need(last_axis(softmax.attrs.get("axis", -1), softmax.inputs[0]), "the softmax is not over the last axis")
    need(last_axis(joined.attrs["axis"], column) and static_dim(column, 3) == 1, "what is joined to the scores is no column")
    need(_leaves_out_last(graph, cut), "what is joined to the scores is not left out after the softmax")
    scores = scores_of(graph, written)
    need(scores is not None and not scores.softcap, "the scores are not query @ key^T, a scale and a mask")
    need(scores.mask is not None and onnx_type(scores.mask) != BOOL, "no mask is added to the scores")
    query = scores.product.inputs[0]
    key, value = untransposed(graph, scores.product.inputs[1]), product.inputs[1]
    need(key is not None, "the second operand of query @ key^T is not a transposed key")
    key, value = (source_of(graph, tensor) or tensor for tensor in (key, value))
    (heads, size), kv_heads = (static_dim(query, axis) for axis in (1, 3)), static_dim(key, 1)
    need(heads and size and kv_heads and static_dim(value, 1) == kv_heads, "the number of heads is not known")
    need(heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups")
    dtype = onnx_type(query)
    need(dtype == onnx_type(key) == onnx_type(value) == onnx_type(written), "query, key and scores differ in type")

    scaled = graph.new("Mul", [query, graph.number(scores.scale, dtype)], shape=query.shape)
    rows = graph.new("Reshape", [scaled, graph.int64([0, kv_heads, -1, size])], shape=[*key.shape[:1], kv_heads, None, size])
    turned = graph.new("Transpose", [key], {"perm": [0, 1, 3, 2]}, shape=[*key.shape[:2], key.shape[3], key.shape[2]])
    products = graph.new("MatMul", [rows, turned], shape=[key.shape[0], kv_heads, None, key.shape[2]])
    apart = graph.new("Reshape", [products, graph.int64([0, heads, -1, 0])], shape=[*query.shape[:3], key.shape[2]])
    masked = graph.new("Add", [apart, scores.mask], shape=written.shape)
    joined.inputs = [masked, column]
    softmax.inputs = [joined.outputs[0]]
    weights = graph.new("Reshape", [cut.outputs[0], graph.int64([0, kv_heads, -1, 0])], shape=products.shape)
    context = graph.new("MatMul", [weights, value], shape=[*products.shape[:3], value.shape[3]])
    graph.replace(product.outputs[0], "Reshape", [context, graph.int64([0, heads, -1, static_dim(value, 3) or 0])])
    return True


def place_of_mask(graph: Graph, reader: gs.Node) -> gs.Node | None:
    """Of the Transpose or MatMul by which this form reads a key or a value, the Add of the mask, whose first input is the scores
    and whose second the mask; None of any other node."""
    if op_of(reader) == "Transpose":
        product = only_consumer(reader.outputs[0], "MatMul") if reader.attrs.get("perm") == [0, 1, 3, 2] else None
        apart = None if product is None else only_consumer(product.outputs[0], "Reshape")
        added = only_consumer(apart.outputs[0], "Add") if apart is not None and _keeps_columns(graph, apart) else None
        return added if added is not None and added.inputs[0] is apart.outputs[0] else None
    rows = producer(reader.inputs[0], "Reshape") if op_of(reader) == "MatMul" else None
    cut = producer(rows.inputs[0], "Slice") if rows is not None and _keeps_columns(graph, rows) else None
    softmax = producer(cut.inputs[0], "Softmax") if cut is not None and _leaves_out_last(graph, cut) else None
    joined = producer(softmax.inputs[0], "Concat") if softmax is not None else None
    if joined is None or not all(last_axis(node.attrs.get("axis", -1), node.outputs[0]) for node in (softmax, joined)):
        return None
    added = producer(joined.inputs[0], "Add")
    apart = producer(added.inputs[0], "Reshape") if added is not None else None
    return added if apart is not None and _keeps_columns(graph, apart) and producer(apart.inputs[0], "MatMul") else None


def _unreduced(graph: Graph, tensor: gs.Tensor) -> gs.Tensor:
    """x, if the tensor is x less the largest element of each of its rows, which no softmax of the rows sees."""
    less = producer(tensor, "Sub")
    if less is None:
        return tensor
    x, subtracted = less.inputs
    largest = producer(through(subtracted, "Unsqueeze"), "ReduceMax", "TopK")
    column = rank(subtracted) == rank(x) and static_dim(subtracted, -1) == 1
    return x if column and largest is not None and largest.inputs[0] is x and _is_of_rows(graph, largest) else tensor


def _is_of_rows(graph: Graph, largest: gs.Node) -> bool:
    """Whether it finds the largest element along the last axis."""
    x, given = largest.inputs[0], graph.constant(largest.inputs[1]) if len(largest.inputs) > 1 else None
    if largest.op == "ReduceMax":
        return given is not None and last_axis(given, x)
    return (
        given is not None
        and given.item() == 1
        and largest.attrs.get("largest", 1) == 1
        and last_axis(largest.attrs.get("axis", -1), x)
    )


def _leaves_out_last(graph: Graph, cut: gs.Node) -> bool:
    """Whether a Slice is x[..., :-1]."""
    given = [graph.constant(tensor) for tensor in cut.inputs[1:]]
    if len(given) < 3 or any(values is None or values.size != 1 for values in given):
        return False
    start, end, axis, step = [int(values.item()) for values in given] + [1] * (4 - len(given))
    return (start, end, step) == (0, -1, 1) and last_axis(axis, cut.inputs[0])


def _keeps_columns(graph: Graph, reshape: gs.Node) -> bool:
    """Whether it leaves the last of four axes as it is, however long."""
    target = graph.constant(reshape.inputs[1])
    kept = target is not None and target.size == 4 == rank(reshape.inputs[0]) and int(target[3]) == 0
    return kept and not reshape.attrs.get("allowzero", 0) and int(np.count_nonzero(target == -1)) == 1

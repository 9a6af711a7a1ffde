"""Rotary embedding over halves, written out, becomes one RotaryEmbedding.

    x * cos + concat(-x2, x1) * sin        with x = concat(x1, x2) on the last axis

cos and sin hold every angle twice; RotaryEmbedding takes the first half, [B, S, D/2], made once for all layers. Where
half precision is cast to float32 and back around it, the casts go, and the tables are cast instead: they are exact to
half precision before they multiply.
"""

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import (
    Graph,
    is_half,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    operands,
    other_input,
    producer,
    rank,
    static_dim,
)
from surgery.probe import evaluate, probes

HALVABLE = ("Cos", "Sin", "Cast", "Unsqueeze", "Squeeze", "Mul", "Expand")


def run(graph: Graph) -> int:
    tables: dict[tuple, gs.Tensor] = {}
    return graph.match(lambda graph, concat: _fuse(graph, concat, tables), graph.nodes("Concat"))


def _fuse(graph: Graph, concat: gs.Node, tables: dict[tuple, gs.Tensor]) -> bool:
    x = _rotated(graph, concat)
    if x is None:
        return False
    sine = only_consumer(concat.outputs[0], "Mul")
    need(sine is not None, "the rotated half is not multiplied by one tensor")
    total = only_consumer(sine.outputs[0], "Add")
    need(total is not None, "the sine part is not added to a cosine part")
    cosine = producer(other_input(total, sine.outputs[0]), "Mul")
    need(cosine is not None and any(left is x for left, _ in operands(cosine)), "the cosine part does not multiply x")
    cos, sin = other_input(cosine, x), other_input(sine, concat.outputs[0])
    heads_axis = _heads_axis(cos)
    need(heads_axis is not None and _heads_axis(sin) == heads_axis, "cos and sin do not broadcast over one heads axis")

    source, result = x, total.outputs[0]
    cast_in, cast_out = producer(x, "Cast"), only_consumer(result, "Cast")
    if cast_in and cast_out and is_half(cast_in.inputs[0]) and cast_out.attrs["to"] == onnx_type(cast_in.inputs[0]):
        source, result = cast_in.inputs[0], cast_out.outputs[0]
    halves = [_table(graph, tensor, heads_axis, onnx_type(source), tables) for tensor in (cos, sin)]
    if heads_axis == 1:
        graph.replace(result, "RotaryEmbedding", [source, *halves], {"interleaved": 0})
    else:
        heads_first = graph.new("Transpose", [source], {"perm": [0, 2, 1, 3]})
        rotated = graph.new("RotaryEmbedding", [heads_first, *halves], {"interleaved": 0})
        graph.replace(result, "Transpose", [rotated], {"perm": [0, 2, 1, 3]})
    return True


def _rotated(graph: Graph, concat: gs.Node) -> gs.Tensor | None:
    """x, if `concat` is concat(-x2, x1); None if it is some other concatenation."""
    if len(concat.inputs) != 2:
        return None
    paired = producer(concat.inputs[0], "Unsqueeze")
    need(paired is None or producer(paired.inputs[0], "Neg") is None, "it turns neighbours, not halves")
    if (negated := producer(concat.inputs[0], "Neg")) is None:
        return None
    second, first = negated.inputs[0], concat.inputs[1]
    x = _halved(graph, first, second)
    need(x is not None, "what is negated and what follows are not the two halves of one tensor")
    need(last_axis(concat.attrs["axis"], x), "the halves do not lie on the last axis")
    need(rank(x) == 4, f"x has rank {rank(x)}, not [batch, heads, sequence, head_dim]")
    return x


def _halved(graph: Graph, first: gs.Tensor, second: gs.Tensor) -> gs.Tensor | None:
    """x, if `first` and `second` are its halves: by Split or by two Slices on the last axis."""
    split = producer(first, "Split")
    if split is not None:
        x = split.inputs[0]
        in_order = len(split.outputs) == 2 and split.outputs[0] is first and split.outputs[1] is second
        sizes = graph.constant(split.inputs[1]) if len(split.inputs) > 1 else np.array([1, 1])
        even = sizes is not None and sizes[0] == sizes[1]
        return x if in_order and even and last_axis(split.attrs.get("axis", 0), x) else None
    low, high = producer(first, "Slice"), producer(second, "Slice")
    if low is None or high is None or low.inputs[0] is not high.inputs[0]:
        return None
    x = low.inputs[0]
    size = static_dim(x, -1)
    if size is None:
        return None
    bounds = [_bounds(graph, node, x, size) for node in (low, high)]
    return x if bounds == [(0, size // 2), (size // 2, size)] else None


def _bounds(graph: Graph, node: gs.Node, x: gs.Tensor, size: int) -> tuple[int, int] | None:
    """Start and end of a Slice of the last axis; None for another axis or step."""
    start, end, axes = (graph.constant(tensor) for tensor in node.inputs[1:4])
    step = graph.scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or end is None or axes is None or not last_axis(axes, x) or step != 1:
        return None
    return slice(start.item(), end.item()).indices(size)[:2]


def _heads_axis(table: gs.Tensor) -> int | None:
    """Over which axis of x, 1 or 2, a table of rank 4 is the same: its axis of size 1."""
    if rank(table) != 4:
        return 1 if rank(table) in (2, 3) and static_dim(table, -3) in (None, 1) else None
    return next((axis for axis in (1, 2) if static_dim(table, axis) == 1), None)


def _table(graph: Graph, table: gs.Tensor, heads_axis: int, dtype: int, made: dict[tuple, gs.Tensor]) -> gs.Tensor:
    """The first half of a table of doubled angles, [B, S, D/2] in `dtype`; made once for each."""
    key = (id(table), heads_axis, dtype)
    if key not in made:
        half = _half(graph, table)
        if half is None:
            need(_is_doubled(graph, table), "the halves of cos or sin cannot be shown to be equal")
            half = _first_half(graph, table)
        if rank(table) == 4:
            half = _without_axis(graph, half, heads_axis)
        elif rank(table) == 2:
            half = graph.new("Unsqueeze", [half, graph.int64([0])])
        if rank(table) == 2 or static_dim(table, 0) == 1:
            half = _expanded(graph, half)
        if onnx_type(table) != dtype:
            half = graph.new("Cast", [half], {"to": dtype}, dtype=dtype)
        made[key] = half
    return made[key]


def _half(graph: Graph, table: gs.Tensor) -> gs.Tensor | None:
    """The table built from single instead of doubled angles, if it is elementwise from concat(angles, angles)."""
    node = producer(table)
    if node is None:
        return None
    if node.op == "Concat":
        doubled = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and last_axis(node.attrs["axis"], table)
        return node.inputs[0] if doubled else None
    if node.op == "Mul":
        scale, angles = next(((a, b) for a, b in operands(node) if graph.scalar(a) is not None), (None, None))
        half = _half(graph, angles) if scale is not None else None
        return graph.new("Mul", [half, scale]) if half is not None else None
    if node.op not in ("Cos", "Sin", "Cast", "Unsqueeze"):
        return None
    if node.op == "Unsqueeze" and rank(table) - 1 in (graph.constant(node.inputs[1]) % rank(table)):
        return None
    half = _half(graph, node.inputs[0])
    if half is None:
        return None
    return graph.new(node.op, [half, *node.inputs[1:]], dict(node.attrs), dtype=onnx_type(table))


def _is_doubled(graph: Graph, table: gs.Tensor) -> bool:
    """Whether both halves of the table are equal wherever it was looked at."""
    for probe in probes():
        values = evaluate(graph, [table], probe)
        if values is None or not np.array_equal(*np.split(values[0], 2, axis=-1)):
            return False
    return True


def _first_half(graph: Graph, table: gs.Tensor) -> gs.Tensor:
    size = static_dim(table, -1)
    need(size is not None and size % 2 == 0, "the size of cos and sin is not known")
    return graph.new("Slice", [table, graph.int64([0]), graph.int64([size // 2]), graph.int64([-1])])


def _without_axis(graph: Graph, half: gs.Tensor, axis: int) -> gs.Tensor:
    node = producer(half, "Unsqueeze")
    if node is not None and (axes := graph.constant(node.inputs[1])) is not None and axes.tolist() in ([axis], [axis - 4]):
        return node.inputs[0]
    return graph.new("Squeeze", [half, graph.int64([axis])])


def _expanded(graph: Graph, half: gs.Tensor) -> gs.Tensor:
    """[1, S, D/2] to [B, S, D/2]: TensorRT does not broadcast tables over the batch."""
    tokens = graph.input(graph.signature.tokens)
    batch = graph.new("Shape", [tokens], {"start": 0, "end": 1}, dtype=np.int64)
    ones = graph.int64([1, 1])
    return graph.new("Expand", [half, graph.new("Concat", [batch, ones], {"axis": 0}, dtype=np.int64)])

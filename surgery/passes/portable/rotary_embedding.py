"""Rotary embedding, written out, becomes one RotaryEmbedding.

    x * cos + concat(-x2, x1) * sin        with x = concat(x1, x2) on the last axis
    x * cos + stack(-x2, x1) * sin         with x = stack(x1, x2), neighbours on the last axis: interleaved = 1

cos and sin hold every angle twice; RotaryEmbedding takes each once, [B, S, D/2], made once for all layers. Where half
precision is cast to float32 and back around it, the casts go, and the tables are cast instead: they are exact to half
precision before they multiply.
"""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import (
    Graph,
    is_half,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    op_of,
    operands,
    other_input,
    producer,
    rank,
    static_dim,
)
from suture.surgery.masks.mask_probe import evaluate, probes


@dataclass
class Turned:
    """x and what the sine multiplies: its halves or its neighbours exchanged, the new first ones negated."""

    x: gs.Tensor
    tensor: gs.Tensor
    interleaved: int


def run(graph: Graph) -> int:
    tables: dict[tuple, gs.Tensor] = {}
    return graph.match(lambda graph, concat: _fuse(graph, concat, tables), graph.nodes("Concat"))


def _fuse(graph: Graph, concat: gs.Node, tables: dict[tuple, gs.Tensor]) -> bool:
    turned = _turned_halves(graph, concat) or _turned_neighbours(graph, concat)
    if turned is None:
        return False
    x, attrs = turned.x, {"interleaved": turned.interleaved}
    sine = only_consumer(turned.tensor, "Mul")
    need(sine is not None, "the rotated half is not multiplied by one tensor")
    total = only_consumer(sine.outputs[0], "Add")
    need(total is not None, "the sine part is not added to a cosine part")
    cosine = producer(other_input(total, sine.outputs[0]), "Mul")
    need(cosine is not None and any(left is x for left, _ in operands(cosine)), "the cosine part does not multiply x")
    cos, sin = other_input(cosine, x), other_input(sine, turned.tensor)
    heads_axis = _heads_axis(cos)
    need(heads_axis is not None and _heads_axis(sin) == heads_axis, "cos and sin do not broadcast over one heads axis")

    source, result = x, total.outputs[0]
    cast_in, cast_out = producer(x, "Cast"), only_consumer(result, "Cast")
    if cast_in and cast_out and is_half(cast_in.inputs[0]) and cast_out.attrs["to"] == onnx_type(cast_in.inputs[0]):
        source, result = cast_in.inputs[0], cast_out.outputs[0]
    need(static_dim(x, -1), "the size of x is not known")
    form = heads_axis, onnx_type(source), turned.interleaved, static_dim(x, -1)
    halves = [_table(graph, each, form, tables) for each in (cos, sin)]
    if heads_axis == 1:
        graph.replace(result, "RotaryEmbedding", [source, *halves], attrs)
    else:
        heads_first = graph.new("Transpose", [source], {"perm": [0, 2, 1, 3]})
        rotated = graph.new("RotaryEmbedding", [heads_first, *halves], attrs)
        graph.replace(result, "Transpose", [rotated], {"perm": [0, 2, 1, 3]})
    return True


def _turned_halves(graph: Graph, concat: gs.Node) -> Turned | None:
    """None if `concat` is not concat(-x2, x1) of anything."""
    if len(concat.inputs) != 2 or (negated := producer(concat.inputs[0], "Neg")) is None:
        return None
    second, first = negated.inputs[0], concat.inputs[1]
    x = _halved(graph, first, second)
    need(x is not None, "what is negated and what follows are not the two halves of one tensor")
    need(last_axis(concat.attrs["axis"], x), "the halves do not lie on the last axis")
    need(rank(x) == 4, f"x has rank {rank(x)}, not [batch, heads, sequence, head_dim]")
    return Turned(x, concat.outputs[0], interleaved=0)


def _turned_neighbours(graph: Graph, concat: gs.Node) -> Turned | None:
    """None if `concat` is not reshape(concat(-x[1::2], x[::2])) over a new last axis."""
    stacked = [node for tensor in concat.inputs if (node := producer(tensor, "Unsqueeze")) is not None]
    if len(stacked) != len(concat.inputs) or len(stacked) != 2 or producer(stacked[0].inputs[0], "Neg") is None:
        return None
    second, first = producer(stacked[0].inputs[0]).inputs[0], stacked[1].inputs[0]
    low, high = producer(first, "Slice"), producer(second, "Slice")
    need(low is not None and high is not None and low.inputs[0] is high.inputs[0], "what is turned is not sliced from one x")
    x = low.inputs[0]
    need(rank(x) == 4, f"x has rank {rank(x)}, not four")
    size = static_dim(x, -1)
    need(size is not None and size % 2 == 0, "the size of x is not known")
    bounds = [_bounds(graph, node, x, size) for node in (low, high)]
    need(bounds == [(0, size, 2), (1, size, 2)], "what is turned are not the even and the odd numbers of x")
    axes = [graph.constant(node.inputs[1]) for node in stacked]
    last = all(each is not None and each.tolist() in ([4], [-1]) for each in axes) and concat.attrs["axis"] in (4, -1)
    need(last, "neighbours are not put side by side again")
    joined = only_consumer(concat.outputs[0], "Reshape")
    same = joined is not None and rank(joined.outputs[0]) == 4 and static_dim(joined.outputs[0], -1) == size
    need(same, "neighbours are not put side by side again")
    known = [(static_dim(joined.outputs[0], axis), static_dim(x, axis)) for axis in range(3)]
    need(all(None in sizes or len(set(sizes)) == 1 for sizes in known), "neighbours are not put side by side again")
    return Turned(x, joined.outputs[0], interleaved=1)


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
    return x if bounds == [(0, size // 2, 1), (size // 2, size, 1)] else None


def _bounds(graph: Graph, node: gs.Node, x: gs.Tensor, size: int) -> tuple[int, int, int] | None:
    """Start, end and step of a Slice of the last axis; None for another axis, or a step backwards."""
    start, end, axes = (graph.constant(tensor) for tensor in node.inputs[1:4])
    step = graph.scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or end is None or axes is None or not last_axis(axes, x) or step is None or step < 1:
        return None
    return slice(start.item(), end.item(), step).indices(size)


def _heads_axis(table: gs.Tensor) -> int | None:
    """Over which axis of x, 1 or 2, a table of rank 4 is the same: its axis of size 1."""
    if rank(table) != 4:
        return 1 if rank(table) in (2, 3) and static_dim(table, -3) in (None, 1) else None
    return next((axis for axis in (1, 2) if static_dim(table, axis) == 1), None)


def _table(graph: Graph, table: gs.Tensor, form: tuple[int, int, int, int], made: dict[tuple, gs.Tensor]) -> gs.Tensor:
    """Each angle of a table of doubled ones once, [B, S, D/2] in a dtype; made once for each. `form`: the heads axis, the
    dtype, whether neighbours are doubled, D."""
    key = (id(table), *form)
    if key not in made:
        heads_axis, dtype, interleaved, size = form
        half = None if interleaved else _half(graph, table)
        if half is None:
            what = "neighbours" if interleaved else "halves"
            need(_is_doubled(graph, table, interleaved, size), f"the {what} of cos or sin cannot be shown to be equal")
            end, step = (size, 2) if interleaved else (size // 2, 1)
            half = graph.new("Slice", [table, *map(graph.int64, ([0], [end], [-1], [step]))])
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
    op = op_of(node)
    if op == "Concat":
        doubled = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and last_axis(node.attrs["axis"], table)
        return node.inputs[0] if doubled else None
    if op == "Mul":
        scale, angles = next(((a, b) for a, b in operands(node) if graph.scalar(a) is not None), (None, None))
        half = _half(graph, angles) if scale is not None else None
        return graph.new("Mul", [half, scale]) if half is not None else None
    if op not in ("Cos", "Sin", "Cast", "Unsqueeze"):
        return None
    if op == "Unsqueeze" and rank(table) - 1 in (graph.constant(node.inputs[1]) % rank(table)):
        return None
    half = _half(graph, node.inputs[0])
    if half is None:
        return None
    return graph.new(node.op, [half, *node.inputs[1:]], dict(node.attrs), dtype=onnx_type(table))


def _is_doubled(graph: Graph, table: gs.Tensor, interleaved: int, size: int) -> bool:
    """Whether both halves of the table, or all neighbours in it, are equal wherever it was looked at."""
    for probe in probes(graph):
        values = evaluate(graph, [table], probe)
        if values is None or values[0].shape[-1] != size:
            return False
        if not np.array_equal(*([values[0][..., i::2] for i in (0, 1)] if interleaved else np.split(values[0], 2, axis=-1))):
            return False
    return True


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

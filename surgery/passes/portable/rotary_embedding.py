"""Rotary embedding, written out, becomes one RotaryEmbedding.

    x * cos + concat(-x2, x1) * sin        with x = concat(x1, x2) on the last axis
    x * cos + stack(-x2, x1) * sin         with x = stack(x1, x2), neighbours on the last axis: interleaved = 1

x: [B, heads, S, D], [B, S, heads, D], or without B, as towers of pictures have it. cos and sin hold every angle twice;
RotaryEmbedding takes each once, [B, S, D/2], made once for all layers. Where half precision is cast to float32 and back around
it, the casts go, and the tables are cast instead: they are exact to half precision before they multiply.
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
    x, rotated = turned.x, turned.tensor
    widened = only_consumer(rotated, "Cast")
    if widened is not None and is_half(rotated):
        rotated = widened.outputs[0]
    sine = only_consumer(rotated, "Mul")
    need(sine is not None, "the rotated half is not multiplied by one tensor")
    total = only_consumer(sine.outputs[0], "Add")
    need(total is not None, "the sine part is not added to a cosine part")
    cosine = producer(other_input(total, sine.outputs[0]), "Mul")
    multiplied = None if cosine is None else next((left for left, _ in operands(cosine) if _is_cast_of(left, x)), None)
    need(multiplied is not None, "the cosine part does not multiply x")
    cos, sin = other_input(cosine, multiplied), other_input(sine, rotated)
    heads_axis = _heads_axis(cos, x)
    need(heads_axis is not None and _heads_axis(sin, x) == heads_axis, "cos and sin do not broadcast over one heads axis")

    source, result = multiplied, total.outputs[0]
    cast_in, cast_out = producer(multiplied, "Cast"), only_consumer(result, "Cast")
    if cast_in and cast_out and is_half(cast_in.inputs[0]) and cast_out.attrs["to"] == onnx_type(cast_in.inputs[0]):
        source, result = cast_in.inputs[0], cast_out.outputs[0]
    need(static_dim(x, -1), "the size of x is not known")
    form = heads_axis, onnx_type(source), turned.interleaved, static_dim(x, -1), rank(x)
    halves = [_table(graph, each, form, source, tables) for each in (cos, sin)]
    _put(graph, source, result, halves, {"interleaved": turned.interleaved}, heads_axis)
    return True


def _is_cast_of(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    cast = producer(tensor, "Cast")
    return tensor is x or (is_half(x) and cast is not None and cast.inputs[0] is x)


def _put(graph: Graph, source: gs.Tensor, result: gs.Variable, halves: list[gs.Tensor], attrs: dict, heads_axis: int) -> None:
    """RotaryEmbedding in place of `result`, over x with a batch and the heads before the sequence."""
    ranks, before = rank(source), source
    if ranks == 3:
        before = graph.new("Unsqueeze", [before, graph.int64([0])], shape=[1, *source.shape])
    if heads_axis == ranks - 3:
        last, ops = "RotaryEmbedding", [before, *halves]
    else:
        before = graph.new("Transpose", [before], {"perm": [0, 2, 1, 3]})
        rotated = graph.new("RotaryEmbedding", [before, *halves], attrs)
        last, ops, attrs = "Transpose", [rotated], {"perm": [0, 2, 1, 3]}
    if ranks == 3:
        last, ops, attrs = "Squeeze", [graph.new(last, ops, attrs), graph.int64([0])], {}
    graph.replace(result, last, ops, attrs)


def _turned_halves(graph: Graph, concat: gs.Node) -> Turned | None:
    """None if `concat` is not concat(-x2, x1) of anything."""
    if len(concat.inputs) != 2 or (negated := producer(concat.inputs[0], "Neg")) is None:
        return None
    second, first = negated.inputs[0], concat.inputs[1]
    x = halved(graph, first, second)
    need(x is not None, "what is negated and what follows are not the two halves of one tensor")
    need(last_axis(concat.attrs["axis"], x), "the halves do not lie on the last axis")
    need(rank(x) in (3, 4), f"x has rank {rank(x)}, not [batch, heads, sequence, head_dim]")
    return Turned(x, concat.outputs[0], interleaved=0)


def _turned_neighbours(graph: Graph, concat: gs.Node) -> Turned | None:
    """None if `concat` is not reshape(concat(-x[1::2], x[::2])) over a new last axis."""
    stacked = [node for tensor in concat.inputs if (node := producer(tensor, "Unsqueeze")) is not None]
    if len(stacked) != len(concat.inputs) or len(stacked) != 2 or producer(stacked[0].inputs[0], "Neg") is None:
        return None
    second, first = producer(stacked[0].inputs[0]).inputs[0], stacked[1].inputs[0]
    x = _sliced(graph, first, second) or _unbound(graph, first, second)
    need(x is not None, "what is turned is not sliced from one x")
    ranks, size = rank(x), static_dim(x, -1)
    axes = [graph.constant(node.inputs[1]) for node in stacked]
    last = all(each is not None and each.tolist() in ([ranks], [-1]) for each in axes) and concat.attrs["axis"] in (ranks, -1)
    need(last, "neighbours are not put side by side again")
    joined = only_consumer(concat.outputs[0], "Reshape")
    need(joined is not None and _same_rows(x, joined.outputs[0]), "neighbours are not put side by side again")
    need(static_dim(joined.outputs[0], -1) == size, "neighbours are not put side by side again")
    return Turned(x, joined.outputs[0], interleaved=1)


def _sliced(graph: Graph, first: gs.Tensor, second: gs.Tensor) -> gs.Tensor | None:
    """x, of which `first` and `second` are every other number, cut out by two Slices."""
    low, high = producer(first, "Slice"), producer(second, "Slice")
    if low is None or high is None or low.inputs[0] is not high.inputs[0]:
        return None
    x, size = low.inputs[0], static_dim(low.inputs[0], -1)
    need(rank(x) in (3, 4), f"x has rank {rank(x)}, not four")
    need(size is not None and size % 2 == 0, "the size of x is not known")
    bounds = [_bounds(graph, node, x, size) for node in (low, high)]
    need(bounds == [(0, size, 2), (1, size, 2)], "what is turned are not the even and the odd numbers of x")
    return x


def _unbound(graph: Graph, first: gs.Tensor, second: gs.Tensor) -> gs.Tensor | None:
    """The same, where x is reshaped to pairs [..., D/2, 2] and these are unbound: by Split, Slice or Gather on their axis."""
    places = [_of_pairs(graph, tensor) for tensor in (first, second)]
    if any(place is None for place in places) or places[0][0] is not places[1][0] or [index for _, index in places] != [0, 1]:
        return None
    pairs = places[0][0]
    reshape = producer(pairs, "Reshape")
    x = reshape.inputs[0] if reshape is not None else None
    if x is None or rank(x) not in (3, 4) or rank(pairs) != rank(x) + 1:
        return None
    sizes = static_dim(x, -1), static_dim(pairs, -2), static_dim(pairs, -1)
    need(None not in sizes and sizes[2] == 2 and sizes[0] == 2 * sizes[1], "pairs are not neighbours of x")
    need(_same_rows(x, pairs), "pairs are not neighbours of x")
    return x


def _of_pairs(graph: Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, int] | None:
    """The tensor [..., 2] from whose last axis this one takes one number, and which."""
    gather = producer(tensor, "Gather")
    if gather is not None:
        pairs, index = gather.inputs[0], graph.constant(gather.inputs[1])
        scalar = index is not None and index.ndim == 0 and last_axis(gather.attrs.get("axis", 0), pairs)
        return (pairs, int(index) % 2) if scalar and static_dim(pairs, -1) == 2 else None
    squeeze = producer(tensor, "Squeeze")
    axes = graph.constant(squeeze.inputs[1]) if squeeze is not None and len(squeeze.inputs) > 1 else None
    if axes is None or not last_axis(axes, squeeze.inputs[0]):
        return None
    part, split = squeeze.inputs[0], producer(squeeze.inputs[0], "Split")
    if split is not None:
        fits = len(split.outputs) == 2 and last_axis(split.attrs.get("axis", 0), split.inputs[0])
        return (split.inputs[0], int(split.outputs[1] is part)) if fits else None
    cut = producer(part, "Slice")
    bounds = _bounds(graph, cut, cut.inputs[0], 2) if cut is not None and static_dim(cut.inputs[0], -1) == 2 else None
    return (cut.inputs[0], bounds[0]) if bounds in ((0, 1, 1), (1, 2, 1)) else None


def _same_rows(x: gs.Tensor, other: gs.Tensor) -> bool:
    """Whether nothing speaks against equal sizes before the last axis of x. As many numbers lie in both."""
    known = [(static_dim(other, axis), static_dim(x, axis)) for axis in range(rank(x) - 1)]
    return rank(other) in (rank(x), rank(x) + 1) and all(None in sizes or len(set(sizes)) == 1 for sizes in known)


def halved(graph: Graph, first: gs.Tensor, second: gs.Tensor) -> gs.Tensor | None:
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


def _heads_axis(table: gs.Tensor, x: gs.Tensor) -> int | None:
    """Over which of x's two axes before its last one the table is the same: its axis of size 1, or the one it lacks."""
    ranks = rank(x)
    if rank(table) == ranks:
        return next((axis for axis in (ranks - 3, ranks - 2) if static_dim(table, axis) == 1), None)
    return ranks - 3 if rank(table) in (2, 3) and rank(table) < ranks and static_dim(table, -3) in (None, 1) else None


def _table(
    graph: Graph, table: gs.Tensor, form: tuple[int, int, int, int, int], x: gs.Tensor, made: dict[tuple, gs.Tensor]
) -> gs.Tensor:
    """Each angle of a table of doubled ones once, [B, S, D/2] in a dtype; made once for each. `form`: the heads axis, the
    dtype, whether neighbours are doubled, D, x's rank."""
    key = (id(table), *form, *x.shape[:1])
    if key not in made:
        heads_axis, dtype, interleaved, size, ranks = form
        half = _half(graph, table, interleaved)
        if half is None:
            what = "neighbours" if interleaved else "halves"
            need(_is_doubled(graph, table, interleaved, size), f"the {what} of cos or sin cannot be shown to be equal")
            end, step = (size, 2) if interleaved else (size // 2, 1)
            half = graph.new("Slice", [table, *map(graph.int64, ([0], [end], [-1], [step]))])
        if rank(table) == ranks:
            half = without_axis(graph, half, heads_axis, ranks)
        if rank(table) == 2 or ranks == 3:
            half = graph.new("Unsqueeze", [half, graph.int64([0])])
        if ranks == 4 and (rank(table) == 2 or static_dim(table, 0) == 1):
            half = expanded(graph, half, x)
        if onnx_type(table) != dtype:
            half = graph.new("Cast", [half], {"to": dtype}, dtype=dtype)
        made[key] = half
    return made[key]


def _half(graph: Graph, table: gs.Tensor, interleaved: int) -> gs.Tensor | None:
    """The table built from single instead of doubled angles, if it is elementwise from what doubles them."""
    node = producer(table)
    if node is None:
        return None
    op = op_of(node)
    if op == "Concat" and interleaved and last_axis(node.attrs["axis"], table):  # of the angles of several axes
        parts = [_half(graph, part, interleaved) for part in node.inputs]
        return None if any(part is None for part in parts) else graph.new("Concat", parts, {"axis": -1})
    if op == "Concat":
        doubled = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and last_axis(node.attrs["axis"], table)
        return node.inputs[0] if doubled and not interleaved else None
    if op == "Reshape":
        return _repeated(graph, node) if interleaved else None
    if op == "Mul":
        scale, angles = next(((a, b) for a, b in operands(node) if graph.scalar(a) is not None), (None, None))
        half = _half(graph, angles, interleaved) if scale is not None else None
        return graph.new("Mul", [half, scale]) if half is not None else None
    if op not in ("Cos", "Sin", "Cast", "Unsqueeze"):
        return None
    if op == "Unsqueeze":
        axes = graph.constant(node.inputs[1])
        if axes is None or rank(table) - 1 in axes % rank(table):
            return None
    half = _half(graph, node.inputs[0], interleaved)
    if half is None:
        return None
    return graph.new(node.op, [half, *node.inputs[1:]], dict(node.attrs), dtype=onnx_type(table))


def _repeated(graph: Graph, reshape: gs.Node) -> gs.Tensor | None:
    """The angles [..., n], of which the Reshape's result [..., 2 n] has each twice, side by side: expanded over a new last axis."""
    expand = producer(reshape.inputs[0], "Expand")
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if unsqueeze is None:
        return None
    angles, wide, result = unsqueeze.inputs[0], expand.outputs[0], reshape.outputs[0]
    axes = graph.constant(unsqueeze.inputs[1])
    if axes is None or not last_axis(axes, unsqueeze.outputs[0]) or rank(wide) != rank(angles) + 1 or static_dim(wide, -1) != 2:
        return None
    count = static_dim(angles, -1)
    same = rank(result) == rank(angles) and count and static_dim(result, -1) == 2 * count and static_dim(wide, -2) == count
    return angles if same and _same_rows(angles, wide) and _same_rows(angles, result) else None


def _is_doubled(graph: Graph, table: gs.Tensor, interleaved: int, size: int) -> bool:
    """Whether both halves of the table, or all neighbours in it, are equal wherever it was looked at."""
    for probe in probes(graph):
        values = evaluate(graph, [table], probe)
        if values is None or values[0].shape[-1] != size:
            return False
        if not np.array_equal(*([values[0][..., i::2] for i in (0, 1)] if interleaved else np.split(values[0], 2, axis=-1))):
            return False
    return True


def without_axis(graph: Graph, half: gs.Tensor, axis: int, ranks: int) -> gs.Tensor:
    node = producer(half, "Unsqueeze")
    if node is not None and (axes := graph.constant(node.inputs[1])) is not None and axes.tolist() in ([axis], [axis - ranks]):
        return node.inputs[0]
    return graph.new("Squeeze", [half, graph.int64([axis])])


def expanded(graph: Graph, half: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """[1, S, D/2] to [B, S, D/2] of x: TensorRT does not broadcast tables over the batch."""
    if static_dim(x, 0) == 1:
        return half
    of_batch = next((tensor for tensor in graph.gs.inputs if tensor.name == graph.signature.tokens), x)
    batch = graph.new("Shape", [of_batch], {"start": 0, "end": 1}, dtype=np.int64)
    ones = graph.int64([1, 1])
    return graph.new("Expand", [half, graph.new("Concat", [batch, ones], {"axis": 0}, dtype=np.int64)])

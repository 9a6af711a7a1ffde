"""A placement carried to another view of the same elements, or shared out among tensors that follow one another on the axis; and
what a Slice takes of an axis."""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of
from suture.surgery.parallel.placement import Indivisible, Placement, Whole
from suture.surgery.shapes.symbolic_dims import SymbolicDim, multiply, quotient


def carried(placement: Placement, sizes: list[SymbolicDim], others: list[SymbolicDim]) -> Placement:
    """The placement of a tensor with these `sizes` on the same elements seen as `others`.

    The divided axis and those below it are one run of elements, and some axis of the other shape begins where it does, is made of
    several of it ([3, heads, width] as one axis: three parts), or is the inner of several that made it."""
    below = multiply(sizes[placement.axis + 1 :])
    run = multiply((placement.size, below))
    numbers: list[Indivisible] = []
    for axis, inner, other in _runs(others):
        for factor in _factors(other, run):  # how many of the runs are in the other
            with_parts = _times(placement, factor)
            try:
                if with_parts is not None and (found := _rescaled(with_parts, axis, below, inner)) is not None:
                    return found
            except Indivisible as number:
                numbers.append(number)
    if numbers:
        raise numbers[-1]
    raise Whole(f"its {len(others)} axes have no part where the divided one of {len(sizes)} has")


def _runs(sizes: list[SymbolicDim]) -> list[tuple[int, SymbolicDim, SymbolicDim]]:
    """Of each axis with more than one element: what lies below it, and what it and that have together."""
    belows = [multiply(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return [(axis, belows[axis], multiply((size, belows[axis]))) for axis, size in enumerate(sizes) if size != 1]


def _factors(run: SymbolicDim, part: SymbolicDim) -> list[int]:
    """How many times `part` is `run`, or, as a negative number, the other way round."""
    up, down = quotient(run, part), quotient(part, run)
    return [number * sign for number, sign in ((up, 1), (down, -1)) if isinstance(number, int) and number > 0][:1]


def _times(placement: Placement, factor: int) -> Placement | None:
    """With all parts repeated, or, of parts that are repeated, one round of them."""
    if factor > 0:
        return Placement(placement.axis, placement.parts * factor)
    count, rest = divmod(len(placement.parts), -factor)
    one = placement.parts[:count]
    return None if rest or one * -factor != placement.parts else Placement(placement.axis, one)


def _rescaled(placement: Placement, axis: int, below: SymbolicDim, inner: SymbolicDim) -> Placement | None:
    """On an axis below which `inner` elements lie in place of `below`."""
    more, fewer = quotient(below, inner), quotient(inner, below)
    try:
        if isinstance(more, int) and more > 0:
            return placement.scaled(axis, more, 1)
        return placement.scaled(axis, 1, fewer) if isinstance(fewer, int) and fewer > 0 else None
    except Indivisible:
        raise
    except Whole:
        return None


def shared_out(placement: Placement, sizes: list[SymbolicDim]) -> list[Placement | None]:
    """Its parts to tensors of these sizes that follow one another; None for all where they do not come out even."""
    parts, found = list(placement.parts), []
    for size in sizes:
        own = []
        while parts and isinstance(size, int) and sum(part.size for part in own) < size:
            own.append(parts.pop(0))
        if sum(part.size for part in own) != size:
            return [None] * len(sizes)
        found.append(Placement(placement.axis, tuple(own)))
    return found


def slice_bounds(graph: Graph, node: gs.Node, sizes: list[SymbolicDim]) -> dict[int, tuple[int, int]] | None:
    """Start and end by axis of a Slice of a tensor with these `sizes`; None where they are computed, or where it takes not all
    between them."""
    starts, ends, axes, steps = (graph.constant(each) for each in inputs_of(node, "starts", "ends", "axes", "steps"))
    if starts is None or ends is None or axes is None or (steps is not None and set(steps.tolist()) != {1}):
        return None
    found = {}
    for axis, start, end in zip(axes.tolist(), starts.tolist(), ends.tolist()):
        size = sizes[axis % len(sizes)]
        if isinstance(size, int):
            start, end, _ = slice(start, end).indices(size)
        found[axis % len(sizes)] = start, end
    return found

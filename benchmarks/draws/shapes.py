"""Shapes of what is drawn."""

from collections.abc import Callable

from benchmarks.draws.canvas import Canvas

Drawing = Callable[[Canvas], object]


def some_shape(c: Canvas, rank: int | None = None) -> list[int | str]:
    rank = rank or c.pick(1, 2, 3, 4)
    sizes = [c.pick("B", "S", 1, 2, 3, 4) for _ in range(rank)]
    return [*sizes[:-1], c.pick(2, 4, 8)]


def some_pair(c: Canvas, kind: str = "float", rank: int | None = None) -> tuple[str, str]:
    """Two tensors that broadcast."""
    shape = some_shape(c, rank)
    other = [1 if c.chance(0.2) else size for size in shape][c.pick(0, 0, 0, len(shape) - 1) :]
    names = [c.any(*shape, kind=kind), c.any(*other, kind=kind)]
    return tuple(names if c.chance(0.7) else names[::-1])

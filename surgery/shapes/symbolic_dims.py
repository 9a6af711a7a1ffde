"""Arithmetic on sizes that are not known yet: sums of products of the axes of tensors."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Axis:
    """The size of one axis of a tensor; with axis -1, an element of a computed tensor."""

    source: int  # number of the tensor, in the order in which they were met
    axis: int
    index: int = 0
    counts: bool = True  # false if it may be negative


@dataclass(frozen=True)
class Sum:
    """A sum of products of sizes: by their axes, the number that multiplies them. No axes: a number alone."""

    terms: tuple[tuple[tuple[Axis, ...], int], ...]

    @property
    def counts(self) -> bool:
        """Whether it cannot be negative."""
        return all(number >= 0 and all(axis.counts for axis in axes) for axes, number in self.terms)

    @property
    def axis(self) -> Axis | None:
        """The axis whose size this is, if it is nothing else."""
        (axes, number), *others = self.terms
        return axes[0] if number == 1 and len(axes) == 1 and not others else None


SymbolicDim = int | bool | Sum


def combined(op: str, row: tuple[SymbolicDim, ...]) -> SymbolicDim | None:
    """What an operator makes of one element of each input; None where that depends on sizes."""
    if op == "Where":
        return (row[1] if row[0] else row[2]) if isinstance(row[0], int) else None
    if op == "Equal":
        if row[0] == row[1] or all(isinstance(dim, int) for dim in row):
            return row[0] == row[1]
        return False if any(isinstance(a, int) and a < 0 and counts(b) for a, b in (row, row[::-1])) else None
    if op == "Add":
        return add(row)
    if op == "Sub":
        return add([row[0], multiply([row[1], -1])])
    return multiply(row) if op == "Mul" else quotient(*row)


def _terms(dim: SymbolicDim) -> dict[tuple[Axis, ...], int]:
    return dict(dim.terms) if isinstance(dim, Sum) else {(): int(dim)}


def _dim(terms: dict[tuple[Axis, ...], int]) -> SymbolicDim:
    terms = {axes: number for axes, number in terms.items() if number}
    return Sum(tuple(sorted(terms.items()))) if set(terms) - {()} else terms.get((), 0)


def add(dims: list[SymbolicDim] | tuple[SymbolicDim, ...]) -> SymbolicDim:
    total: dict[tuple[Axis, ...], int] = {}
    for dim in dims:
        for axes, number in _terms(dim).items():
            total[axes] = total.get(axes, 0) + number
    return _dim(total)


def multiply(dims: list[SymbolicDim] | tuple[SymbolicDim, ...]) -> SymbolicDim:
    result: dict[tuple[Axis, ...], int] = {(): 1}
    for dim in dims:
        product: dict[tuple[Axis, ...], int] = {}
        for axes, number in result.items():
            for others, factor in _terms(dim).items():
                key = tuple(sorted((*axes, *others)))
                product[key] = product.get(key, 0) + number * factor
        result = product
    return _dim(result)


def quotient(total: SymbolicDim, part: SymbolicDim) -> SymbolicDim | None:
    """total / part, if part is one product and it comes out even."""
    divisors = _terms(part)
    if len(divisors) != 1 or not next(iter(divisors.values())):
        return None
    (divided, divisor), result = next(iter(divisors.items())), {}
    for axes, number in _terms(total).items():
        left = list(axes)
        for axis in divided:
            if axis not in left:
                return None
            left.remove(axis)
        if number % divisor:
            return None
        result[tuple(left)] = number // divisor
    return _dim(result)


def broadcast(shapes: list[list[SymbolicDim]]) -> list[SymbolicDim | None]:
    """The shape that these broadcast to, None for an axis where that depends on sizes."""
    length = max(map(len, shapes))
    padded = [[1] * (length - len(shape)) + shape for shape in shapes]
    result = []
    for sizes in zip(*padded):
        sizes = {size for size in sizes if size != 1 or not isinstance(size, int)}
        numbers = {size for size in sizes if isinstance(size, int)}
        result.append(1 if not sizes else numbers.pop() if numbers else sizes.pop() if len(sizes) == 1 else None)
    return result


def counts(dim: SymbolicDim) -> bool:
    return dim >= 0 if isinstance(dim, int) else dim.counts

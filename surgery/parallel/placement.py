"""Which part of a tensor each rank has: equal pieces of one axis, in rank order."""

from dataclasses import dataclass


class Whole(Exception):
    """A tensor cannot be divided so: says why."""


class Indivisible(Whole):
    """Because a number does not come out even."""


@dataclass(frozen=True)
class Share:
    """`size` elements of an axis in `pieces` equal pieces, of which rank r of N has piece r · pieces / N, rounded down: fewer
    pieces than ranks are repeated."""

    size: int
    pieces: int

    def __post_init__(self) -> None:
        if self.size % self.pieces:
            raise Indivisible(f"{self.size} does not divide by {self.pieces}")

    @property
    def local(self) -> int:
        return self.size // self.pieces


@dataclass(frozen=True)
class Placement:
    """The axis (from 0) that is divided, and the parts that lie one after the other on it, each divided by itself: queries,
    keys and values of one packed projection are three."""

    axis: int
    parts: tuple[Share, ...]

    @property
    def size(self) -> int:
        """Of the axis in the whole tensor."""
        return sum(part.size for part in self.parts)

    @property
    def local(self) -> int:
        """Of the axis on each rank."""
        return sum(part.local for part in self.parts)

    @property
    def divides(self) -> bool:
        """Whether a rank has less than all."""
        return any(part.pieces > 1 for part in self.parts)

    def at(self, axis: int) -> "Placement":
        return Placement(axis, self.parts)

    def scaled(self, axis: int, numerator: int, denominator: int) -> "Placement":
        """On an axis of numerator / denominator as many elements."""
        sizes = [divmod(part.size * numerator, denominator) for part in self.parts]
        if any(rest for _, rest in sizes):
            raise Whole(f"{self.size} elements are not {denominator} times a number")
        return Placement(axis, tuple(Share(size, part.pieces) for (size, _), part in zip(sizes, self.parts)))

    def spans(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Start and end, on the axis of the whole tensor, of what `rank` has."""
        found, start = [], 0
        for part in self.parts:
            piece = rank * part.pieces // ranks
            found.append((start + piece * part.local, start + (piece + 1) * part.local))
            start += part.size
        return found

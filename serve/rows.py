"""The rows of a batch: which request has which, and what each one's cache holds.

What a row's cache holds stays there until another prompt overwrites it, so a prompt that begins with the same tokens has only
the rest read: in the row itself, or in another one that these slots are copied to. Under dynamic NTK the cache is reused
as long as the scale (alpha) is the one that it was computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from suture.core.signature import ntk_alpha
from suture.runtime.decoders import OfSignature, RowDecoder
from suture.serve.request import GenerationRequest


@dataclass
class CacheRow:
    held: list[int] = field(default_factory=list)  # the tokens that its cache is known to hold
    alpha: float = 1.0
    request: GenerationRequest | None = None
    prompt: list[int] = field(default_factory=list)  # the request's, behind the model's prefix
    chosen: int = 0  # tokens of the answer, those included that have not arrived


class Rows:
    """`spare`: slots that a row which takes no part in a step needs, since the step writes to it all the same."""

    def __init__(self, model: OfSignature, decoder: RowDecoder, count: int, spare: int):
        self.model, self.decoder = model, decoder
        self.rows = [CacheRow() for _ in range(count)]
        self.room = None if model.longest is None else model.longest - spare

    def __getitem__(self, index: int) -> CacheRow:
        return self.rows[index]

    @property
    def used(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.request is not None]

    @property
    def free(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.request is None]

    @property
    def reading(self) -> int | None:
        """The row whose prompt is being read: there is one at most, so that the next request finds what it held."""
        return next((index for index in self.used if self.rows[index].chosen == 0), None)

    def of(self, request: GenerationRequest) -> int:
        return next(index for index in self.used if self.rows[index].request is request)

    def admit(self, request: GenerationRequest) -> int:
        """Gives the request the free row whose cache loses the least by it, with the longest beginning of its prompt that any row
        holds. There has to be a free row."""
        trained = self.model.trained_length
        prompt = [*self.model.prefix, *request.prompt]
        alpha = ntk_alpha(len(prompt), trained) if trained else 1.0
        alike = [self._alike(row, prompt, alpha) for row in self.rows]
        best = max(alike)
        source = alike.index(best)

        def lost(index: int) -> tuple[int, bool]:
            return len(self.rows[index].held) - (best if alike[index] == best else 0), alike[index] != best

        index = min(self.free, key=lost)
        if alike[index] < best:
            self.decoder.copy(source, index, best)
        else:
            self.decoder.keep(index, best)
        request.reused = best
        self.rows[index] = CacheRow(prompt[:best], alpha, request, prompt)
        return index

    def swap(self, one: int, other: int) -> None:
        self.decoder.swap(one, other)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def release(self, index: int) -> None:
        """The row's request has ended; its cache stays, but for the slots that a step of the others writes to."""
        row = self.rows[index]
        kept = row.held if self.room is None else row.held[: self.room]
        self.rows[index] = CacheRow(kept, row.alpha)
        self.decoder.keep(index, len(kept))

    def forget(self) -> None:
        """What the caches of free rows hold is of no use any more."""
        for index in self.free:
            self.rows[index] = CacheRow()
            self.decoder.keep(index, 0)

    def _alike(self, row: CacheRow, prompt: list[int], alpha: float) -> int:
        """Tokens of the prompt that the row holds, but for its last, whose logits are wanted. Where a prompt sees itself in both
        directions, nothing of it can be reused."""
        return 0 if self.model.bidirectional or row.alpha != alpha else common(row.held, prompt[:-1])


def common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, (ours, theirs) in enumerate(zip(held, prompt)) if ours != theirs), min(len(held), len(prompt))
    )

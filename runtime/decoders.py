"""Steps a decoder through tokens and keeps its KV cache between steps.

B rows take S tokens a step, padded on the right; `counts` says how many of a row's tokens are valid, from 0 to S. What
a padded position computes is never looked at, and its slot in the cache is given to the row's next token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from suture.core.cpm_inputs import made_up
from suture.core.signature import Signature
from suture.core.step_inputs import Embed, positions_of, step_values, valid_slots
from suture.runtime.engine import to_numpy
from suture.runtime.seen import Placed

# tokens [B,S], positions [B,S], mask [B,P+S], pasts [B,kv_heads,P,head_dim], alpha [B], cross-attention's caches by name
# where there are any -> logits, presents
Forward = Callable[..., tuple[np.ndarray, list[np.ndarray]]]
ALL_ROWS = slice(None)

NOISE_SEED = 20  # for the slots of a static cache that nothing has been written to
ENCODER_SEED = 21
NOISE_PERIOD = 65537  # a prime, so that no two heads or slots have the same noise


@dataclass(frozen=True)
class OfSignature:
    """A model's name, its signature, and what that says of it."""

    name: str
    signature: Signature

    @property
    def dtype(self) -> int:
        return self.signature.float_dtype

    @property
    def capacity(self) -> int | None:
        return self.signature.capacity

    @property
    def trained_length(self) -> int | None:
        return self.signature.ntk_trained_length

    @property
    def longest(self) -> int | None:
        """The most tokens that a sequence can have; None where neither cache nor positions bound it."""
        bounds = (self.signature.capacity, self.signature.learned_positions)
        return min((bound for bound in bounds if bound), default=None)

    @property
    def last_only(self) -> bool:
        """True if the graph gives logits for each row's last valid token only."""
        return self.signature.last_only

    @property
    def bidirectional(self) -> bool:
        """True if a step's tokens see each other: a prompt is one step."""
        return self.signature.bidirectional

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that begin every row, before the text."""
        return self.signature.prefix

    @property
    def cache_names(self) -> list[tuple[int, str]]:
        return [(cache.layer, cache.role) for cache in self.signature.caches]


class Decoder(Protocol):
    lengths: np.ndarray  # int64 [B]: valid tokens of each row so far

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Logits [B,S,vocab], or [B,1,vocab] from a graph that gives each row's last valid token only."""

    def caches(self) -> list[np.ndarray]:
        """Of each layer key and value, [B,kv_heads,slots,head_dim]: row b's tokens fill its first lengths[b] slots."""


class RowDecoder(Decoder, Protocol):
    """A decoder whose rows can be stepped apart and begun anew, as one after another sequence takes a row."""

    def advance(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray, rows: slice = ALL_ROWS) -> torch.Tensor:
        """A step of some adjacent rows, to which the arguments belong. Logits as of `step`, on the device that they were
        computed on; they hold until the next step."""

    def decode(self, tokens: torch.Tensor, counts: np.ndarray, alpha: np.ndarray, rows: slice) -> torch.Tensor:
        """A step of one token, int64 [B] where logits lie, for those of these rows whose count is 1, not 0. Waits for nothing
        that a GPU computes, where that can be: the step before may not have computed the tokens yet."""

    def keep(self, row: int, count: int) -> None:
        """Forgets all but the first `count` tokens of a row."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Gives the target row the first `count` tokens of another one, and nothing else."""

    def swap(self, one: int, other: int) -> None:
        """Exchanges two rows."""

    def step_rows(self, busy: int) -> int:
        """How many rows, from the first on, a step of one token takes where the first `busy` have to be in it."""

    def cross(self, values: dict[str, np.ndarray]) -> None:
        """What cross-attention reads from now on: the inputs [B,kv_heads,slots,head_dim] of Signature.encoder_caches."""

    @property
    def slot_bytes(self) -> int:
        """What one token takes in all caches."""

    @property
    def encoder_bytes(self) -> int:
        """What a row's caches of cross-attention take, all of which every step reads."""


class DecoderSession(Protocol):
    """A batch in a runtime that computes in memory bound to it: suture.runtime.io_binding.BoundSession, suture.runtime.engine.EngineSession."""

    caches: dict[str, torch.Tensor]  # by input [B,kv_heads,L,head_dim]; a step writes its tokens' keys and values
    crossed: dict[str, torch.Tensor]  # the same for those that no step changes
    all_at_once: bool  # whether a step of one token is quickest for all rows

    def advance(self, feeds: dict[str, np.ndarray | torch.Tensor], rows: slice) -> torch.Tensor: ...


class GrowingDecoder:
    """A cache that each step returns longer. Between steps it is packed, so that a row's tokens lie side by side
    whatever padding they came with; slots beyond a shorter row's length are masked."""

    def __init__(self, forward: Forward, empty: list[np.ndarray], placed: Placed | None = None):
        self.forward, self.pasts, self.placed = forward, empty, placed
        self.crossed: dict[str, np.ndarray] = {}
        self.lengths = np.zeros(len(empty[0]), np.int64)

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray, rows: slice = ALL_ROWS) -> np.ndarray:
        lengths, pasts = self.lengths[rows], [past[rows] for past in self.pasts]
        valid = valid_slots(lengths, counts, pasts[0].shape[2], tokens_BS.shape[1])
        positions = _positions(self.placed, tokens_BS, counts, lengths, rows)
        crossed = {name: value[rows] for name, value in self.crossed.items()}
        logits, presents = self.forward(tokens_BS, positions, valid.astype(np.int64), pasts, alpha, **crossed)
        packed = [_packed(present, valid) for present in presents]
        whole = len(lengths) == len(self.lengths)
        self.pasts = packed if whole else [_joined(past, part, rows) for past, part in zip(self.pasts, packed)]
        self.lengths = self.lengths.copy()
        self.lengths[rows] += counts
        return logits

    def advance(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray, rows: slice = ALL_ROWS) -> torch.Tensor:
        return torch.from_numpy(self.step(tokens_BS, counts, alpha, rows))

    def decode(self, tokens: torch.Tensor, counts: np.ndarray, alpha: np.ndarray, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self.step(tokens.numpy()[:, None], counts, alpha, rows))

    def keep(self, row: int, count: int) -> None:
        self.lengths[row] = count

    def copy(self, source: int, target: int, count: int) -> None:
        for past in self.pasts:
            past[target, :, :count] = past[source, :, :count]
        self.lengths[target] = count

    def swap(self, one: int, other: int) -> None:
        for values in (self.lengths, *self.pasts):
            values[[one, other]] = values[[other, one]]

    def step_rows(self, busy: int) -> int:
        return len(self.lengths)  # fewer would be put together with the others' caches, all of which are copied then

    def cross(self, values: dict[str, np.ndarray]) -> None:
        self.crossed = values

    @property
    def slot_bytes(self) -> int:
        return sum(past.shape[1] * past.shape[3] * past.itemsize for past in self.pasts)

    @property
    def encoder_bytes(self) -> int:
        return sum(cache[0].nbytes for cache in self.crossed.values())

    def caches(self) -> list[np.ndarray]:
        return self.pasts


class StaticDecoder:
    """A cache of fixed capacity, the same buffer as input and output of each step.

    With `noise` it begins full of it: a graph that attends to a slot which nobody has written to shows it. `embed` and
    `noise` as of step_values: without noise positions are a text's.
    """

    def __init__(
        self,
        session: DecoderSession,
        signature: Signature,
        noise: bool = True,
        embed: Embed | None = None,
        placed: Placed | None = None,
    ):
        self.session, self.signature, self.embed, self.text, self.placed = session, signature, embed, not noise, placed
        first = session.caches[signature.caches[0].past]
        self.lengths = np.zeros(len(first), np.int64)
        self.ends = torch.zeros(len(first), dtype=torch.int64, device=first.device)  # the lengths, where the caches are
        self.sent: dict[str, tuple[bytes, torch.Tensor]] = {}  # what stays there from step to step, and its values
        if noise:
            values = np.random.default_rng(NOISE_SEED).standard_normal(NOISE_PERIOD, np.float32)
            for cache in signature.caches:
                buffer = session.caches[cache.past]
                buffer.copy_(torch.from_numpy(np.resize(values, tuple(buffer.shape))))

    def feeds(
        self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray, rows: slice = ALL_ROWS
    ) -> dict[str, np.ndarray]:
        """What the graph is given for a step, by name, beside its caches."""
        names, lengths = self.signature, self.lengths[rows]
        positions = _positions(self.placed, tokens_BS, counts, lengths, rows)
        return step_values(names, tokens_BS, positions, alpha, lengths, counts, self.embed, self.text)

    def advance(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray, rows: slice = ALL_ROWS) -> torch.Tensor:
        logits = self.session.advance(self.feeds(tokens_BS, counts, alpha, rows), rows)
        self.lengths = self.lengths.copy()
        self.lengths[rows] += counts
        self.ends[rows] += torch.from_numpy(counts).to(self.ends.device, non_blocking=True)
        return logits

    def decode(self, tokens: torch.Tensor, counts: np.ndarray, alpha: np.ndarray, rows: slice) -> torch.Tensor:
        if self.embed is not None:  # which computes on the host
            return self.advance(tokens.cpu().numpy()[:, None], counts, alpha, rows)
        names, ends = self.signature, self.ends[rows]
        counted = self._resident("counts", counts)
        positions = (ends - (counted == 0).long()).clamp(min=0)[:, None]
        if names.position_rows is not None:
            positions = positions.expand(names.position_rows, -1, -1)
        values = {
            names.tokens: tokens[:, None],
            names.positions: positions,
            names.write_indices: ends,
            names.sequence_lengths: counted,
            names.ntk_alpha: self._resident("alpha", alpha),
        }
        logits = self.session.advance({name: value for name, value in values.items() if name is not None}, rows)
        self.lengths[rows] += counts
        self.ends[rows] += counted
        return logits

    def _resident(self, name: str, values: np.ndarray) -> torch.Tensor:
        """The values where the caches are, sent there if they are others than before."""
        key = values.tobytes()
        if name not in self.sent or self.sent[name][0] != key:
            self.sent[name] = key, torch.from_numpy(values.copy()).to(self.ends.device, non_blocking=True)
        return self.sent[name][1]

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return to_numpy(self.advance(tokens_BS, counts, alpha))

    def keep(self, row: int, count: int) -> None:
        self.lengths[row] = self.ends[row] = count

    def copy(self, source: int, target: int, count: int) -> None:
        for cache in self.signature.caches:
            buffer = self.session.caches[cache.past]
            buffer[target, :, :count] = buffer[source, :, :count]
        self.keep(target, count)

    def swap(self, one: int, other: int) -> None:
        pair, turned, used = [one, other], [other, one], int(max(self.lengths[one], self.lengths[other]))
        for cache in self.signature.caches:
            buffer = self.session.caches[cache.past]
            buffer[pair, :, :used] = buffer[turned, :, :used]
        self.lengths[pair], self.ends[pair] = self.lengths[turned], self.ends[turned]

    def step_rows(self, busy: int) -> int:
        """1, 2, 4, 8, ... or all, so that few sizes are bound and captured. All, where only a step of all is captured."""
        rows = len(self.lengths)
        return rows if self.session.all_at_once else min(1 << (busy - 1).bit_length(), rows)

    def cross(self, values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            self.session.crossed[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))

    @property
    def slot_bytes(self) -> int:
        caches = (self.session.caches[cache.past] for cache in self.signature.caches)
        return sum(cache.shape[1] * cache.shape[3] * cache.element_size() for cache in caches)

    @property
    def encoder_bytes(self) -> int:
        return sum(cache[0].nbytes for cache in self.session.crossed.values())

    def caches(self) -> list[np.ndarray]:
        return [to_numpy(self.session.caches[cache.past]) for cache in self.signature.caches]


def _positions(
    placed: Placed | None, tokens_BS: np.ndarray, counts: np.ndarray, lengths: np.ndarray, rows: slice
) -> np.ndarray:
    return positions_of(lengths, counts, tokens_BS.shape[1]) if placed is None else placed(tokens_BS, counts, lengths, rows)


def _packed(present: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if valid.all():
        return present
    lengths = valid.sum(axis=1)
    packed = np.zeros((*present.shape[:2], lengths.max(), present.shape[3]), present.dtype)
    for row, length in enumerate(lengths):
        packed[row, :, :length] = present[row][:, valid[row]]
    return packed


def _joined(past: np.ndarray, part: np.ndarray, rows: slice) -> np.ndarray:
    """The caches of all rows [B,kv_heads,P,head_dim] with those of some rows, `part`, in their place."""
    slots = max(past.shape[2], part.shape[2])
    joined = np.zeros((*past.shape[:2], slots, past.shape[3]), past.dtype)
    joined[:, :, : past.shape[2]] = past
    joined[rows, :, : part.shape[2]] = part
    return joined


def made_up_constants(
    signature: Signature, encoder_shapes: list[tuple[int, int, int]], batch: int, dtype: type
) -> dict[str, np.ndarray]:
    """Values for the inputs that no step changes, the same for every model that is asked: what a decoder reads of an
    encoder, and a row's segments."""
    caches = zip(signature.encoder_caches, encoder_caches(encoder_shapes, batch, dtype))
    return {cache.past: value for cache, value in caches} | made_up(signature.layout, batch, signature.capacity)


def encoder_caches(shapes: list[tuple[int, int, int]], batch: int, dtype: type) -> list[np.ndarray]:
    """Made-up keys and values of cross-attention [B,heads,slots,head_dim] for caches of these shapes: what a decoder reads
    of an encoder, the same for all rows and for every model that is asked."""
    random = np.random.default_rng(ENCODER_SEED)
    made = [random.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]
    return [np.repeat(cache[None], batch, axis=0) for cache in made]

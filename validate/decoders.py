"""Steps a decoder through tokens and keeps its KV cache between steps.

B rows take S tokens a step, padded on the right; `counts` says how many of a row's tokens are valid, from 0 to S. What
a padded position computes is never looked at, and its slot in the cache is given to the row's next token.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from contracts.signature import Signature

# tokens [B,S], positions [B,S], mask [B,P+S], pasts [B,kv_heads,P,head_dim], alpha [B] -> logits, presents
Forward = Callable[..., tuple[np.ndarray, list[np.ndarray]]]
# inputs by name without the caches, and the caches [B,kv_heads,L,head_dim], updated in place -> logits
StaticForward = Callable[[dict[str, np.ndarray], list[np.ndarray]], np.ndarray]

NOISE_SEED = 20  # for the slots of a static cache that nothing has been written to
NOISE_PERIOD = 65537  # a prime, so that no two heads or slots have the same noise


class OfSignature:
    """The part of a validate.runners.Model that its signature says."""

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
    def last_only(self) -> bool:
        return self.signature.sequence_lengths is not None

    @property
    def cache_names(self) -> list[tuple[int, str]]:
        return [(cache.layer, cache.role) for cache in self.signature.caches]


class Decoder(Protocol):
    lengths: np.ndarray  # int64 [B]: valid tokens of each row so far

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Logits [B,S,vocab], or [B,1,vocab] from a graph that gives each row's last valid token only."""

    def caches(self) -> list[np.ndarray]:
        """Of each layer key and value, [B,kv_heads,slots,head_dim]: row b's tokens fill its first lengths[b] slots."""


class GrowingDecoder:
    """A cache that each step returns longer. Between steps it is packed, so that a row's tokens lie side by side
    whatever padding they came with; slots beyond a shorter row's length are masked."""

    def __init__(self, forward: Forward, empty: list[np.ndarray]):
        self.forward, self.pasts = forward, empty
        self.lengths = np.zeros(len(empty[0]), np.int64)

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        past_slots = np.arange(self.pasts[0].shape[2])
        new_slots = np.arange(tokens_BS.shape[1])
        valid = np.concatenate([past_slots < self.lengths[:, None], new_slots < counts[:, None]], axis=1)
        positions = positions_of(self.lengths, counts, tokens_BS.shape[1])
        logits, presents = self.forward(tokens_BS, positions, valid.astype(np.int64), self.pasts, alpha)
        self.pasts = [_packed(present, valid) for present in presents]
        self.lengths = self.lengths + counts
        return logits

    def caches(self) -> list[np.ndarray]:
        return self.pasts


class StaticDecoder:
    """A cache of fixed capacity, the same buffer as input and output of each step, as an engine binds it.

    It begins full of noise: a graph that attends to a slot which nobody has written to shows it.
    """

    def __init__(self, forward: StaticForward, signature: Signature, shapes: list[tuple], dtype: type):
        self.forward, self.signature = forward, signature
        noise = np.random.default_rng(NOISE_SEED).standard_normal(NOISE_PERIOD, np.float32).astype(dtype)
        self.buffers = [np.resize(noise, shape) for shape in shapes]
        self.lengths = np.zeros(shapes[0][0], np.int64)

    def step(self, tokens_BS: np.ndarray, counts: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        names = self.signature
        feeds = {
            names.tokens: tokens_BS,
            names.positions: positions_of(self.lengths, counts, tokens_BS.shape[1]),
            names.write_indices: self.lengths,
            names.sequence_lengths: counts,
            names.ntk_alpha: alpha,
        }
        logits = self.forward({name: value for name, value in feeds.items() if name is not None}, self.buffers)
        self.lengths = self.lengths + counts
        return logits

    def caches(self) -> list[np.ndarray]:
        return self.buffers


def positions_of(lengths: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """int64 [B,S]: where each token of a step stands in its row. Padding repeats the row's last position, so that a
    model with a table of positions is never asked for one beyond it."""
    offsets = np.minimum(np.arange(width), np.maximum(counts[:, None] - 1, 0))
    return np.maximum(lengths[:, None] + offsets - (counts[:, None] == 0), 0)


def _packed(present: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if valid.all():
        return present
    lengths = valid.sum(axis=1)
    packed = np.zeros((*present.shape[:2], lengths.max(), present.shape[3]), present.dtype)
    for row, length in enumerate(lengths):
        packed[row, :, :length] = present[row][:, valid[row]]
    return packed

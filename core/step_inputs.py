"""What a decoder is given for the tokens of a step and for where they stand, in the form that its signature has.

Token ids and positions [B, S] are enough for most. A graph that takes embeddings gets made-up ones, the same for the same
token, where nobody has the model's own. One that takes rows of positions, as multimodal rotary embedding (mrope) does, gets
them as a text with pictures has them: rows that differ show which of them a graph reads.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx

from suture.core.additive_mask import hiding
from suture.core.signature import Signature

Embed = Callable[[np.ndarray], np.ndarray]  # token ids [B,S] -> embeddings [B,S,width]

SEED, PERIOD, STRIDE = 22, 65537, 7919  # primes, so that no two tokens have the same embedding
BLOCK, PATCHES = 8, 4  # in a block of tokens the last ones are a picture, two patches wide


def step_values(
    signature: Signature,
    tokens_BS: np.ndarray,
    positions_BS: np.ndarray,
    alpha: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    embed: Embed | None = None,
    text: bool = False,
) -> dict[str, np.ndarray]:
    """By name, what a graph is given for a step of some rows beside its caches, its mask, and what no step changes. `lengths`
    and `counts`, int64 [B]: the tokens that a row has, and that it adds; `alpha`, float32 [B]: its scale of dynamic NTK.
    `embed`: the model's own embeddings, if they are not to be made up; `text` as of position_values."""
    own = None if signature.embedding_width is None else embed
    values = {
        signature.tokens: token_values(signature, tokens_BS) if own is None else own(tokens_BS),
        signature.positions: position_values(signature, positions_BS, text),
        signature.write_indices: lengths,
        signature.sequence_lengths: counts,
        signature.ntk_alpha: alpha,
    }
    return {name: value for name, value in values.items() if name is not None and value is not None}


def positions_of(lengths: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """int64 [B,S]: where each token of a step stands in its row. Padding repeats the row's last position, so that a
    model with a table of positions is never asked for one beyond it."""
    offsets = np.minimum(np.arange(width), np.maximum(counts[:, None] - 1, 0))
    return np.maximum(lengths[:, None] + offsets - (counts[:, None] == 0), 0)


def valid_slots(lengths: np.ndarray, counts: np.ndarray, cached: int, width: int) -> np.ndarray:
    """bool [B, cached + width]: the slots of a growing cache that hold tokens once a step of `width` tokens has grown it."""
    past = np.arange(cached) < lengths[:, None]
    return np.concatenate([past, np.arange(width) < counts[:, None]], axis=1)


def mask_values(mask: onnx.TypeProto.Tensor, signature: Signature, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For an input of this type: which slots count, as 1 and 0, [B, slots]; or, where it has four dimensions, which each of
    the step's tokens sees, [B, 1, S, slots], as bool, or as what is added to the scores. The cache's slots are those that
    a growing one has after the step, padded to the longest row, or a static one's capacity."""
    cached, width = int(lengths.max()), int(counts.max())
    own = np.arange(width)[:, None]
    if signature.capacity is not None:
        slots = np.arange(signature.capacity)
        valid, causal = slots < (lengths + counts)[:, None], slots <= lengths[:, None, None] + own
    else:
        valid = valid_slots(lengths, counts, cached, width)
        causal = (np.arange(cached + width) <= cached + own) & valid[:, None]
    return valid if len(mask.shape.dim) == 2 else hiding(causal[:, None], mask.elem_type)


def token_values(signature: Signature, ids_BS: np.ndarray) -> np.ndarray:
    """int64 [B, S], or float32 [B, S, width] that every float type holds."""
    if signature.embedding_width is None:
        return ids_BS
    places = ids_BS[..., None] * STRIDE + np.arange(signature.embedding_width)
    return _noise()[places % PERIOD]


def position_values(signature: Signature, positions_BS: np.ndarray, text: bool = False) -> np.ndarray:
    """int64 [B, S], or [rows, B, S]: temporal, height and width, after as many rows like a text's as there are more. With
    `text` all rows are alike, as they are where there is no picture."""
    return in_rows(signature.position_rows, positions_BS, text)


def in_rows(rows: int | None, positions_BS: np.ndarray, text: bool = False) -> np.ndarray:
    """The same, for what has so many rows; None: one position a token."""
    if rows is None or positions_BS.ndim > 2:
        return positions_BS
    if text:
        return np.repeat(positions_BS[None], rows, axis=0)
    patch = np.maximum(positions_BS % BLOCK - (BLOCK - PATCHES), 0)
    first = positions_BS - patch
    return np.stack([*[positions_BS] * (rows - 3), first, first + patch // 2, first + patch % 2])


@cache
def _noise() -> np.ndarray:
    values = np.random.default_rng(SEED).standard_normal(PERIOD, np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bfloat16's bits; float16 has more

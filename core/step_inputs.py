"""What a decoder is given for the tokens of a step and for where they stand, in the form that its signature has.

Token ids and positions [B, S] are enough for most. A graph that takes embeddings gets made-up ones, the same for the same
token, where nobody has the model's own. One that takes rows of positions, as multimodal rotary embedding (mrope) does, gets
them as a text with pictures has them: rows that differ show which of them a graph reads.
"""

from functools import cache

import numpy as np

from suture.core.signature import Signature

SEED, PERIOD, STRIDE = 22, 65537, 7919  # primes, so that no two tokens have the same embedding
BLOCK, PATCHES = 8, 4  # in a block of tokens the last ones are a picture, two patches wide


def token_values(signature: Signature, ids_BS: np.ndarray) -> np.ndarray:
    """int64 [B, S], or float32 [B, S, width] that every float type holds."""
    if signature.embedding_width is None:
        return ids_BS
    places = ids_BS[..., None] * STRIDE + np.arange(signature.embedding_width)
    return _noise()[places % PERIOD]


def position_values(signature: Signature, positions_BS: np.ndarray, text: bool = False) -> np.ndarray:
    """int64 [B, S], or [rows, B, S]: temporal, height and width, after as many rows like a text's as there are more. With
    `text` all rows are alike, as they are where there is no picture."""
    rows = signature.position_rows
    if rows is None:
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

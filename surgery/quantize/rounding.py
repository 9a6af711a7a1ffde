"""Weights to small numbers with scales: symmetric, to nearest, ties to even, with the scale as it will be stored.

q = clamp(round(w / scale), least, largest)       scale = max(w / largest, w / least), over an output's inputs or a block
"""

import numpy as np
import torch

from suture.core.dtypes import torch_dtype
from suture.surgery.quantize.formats import FP8, Values

CLIPS = 1 - torch.arange(0, 11) * 0.05  # shares of the largest weight that a clipping search tries


def scales_of(largest: torch.Tensor, values: Values, dtype: int) -> torch.Tensor:
    """Scales for numbers of at most this size on either side."""
    return stored(largest / values.largest, dtype)


def stored(scales: torch.Tensor, dtype: int) -> torch.Tensor:
    """Scales as the float type `dtype` holds them; 1 where all numbers are zero."""
    scales = scales.to(torch_dtype(dtype)).float()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def round_to(scaled: torch.Tensor, values: Values) -> torch.Tensor:
    """float32 numbers of the type's: integers, or what an fp8 number can be. May use the memory of `scaled`."""
    if values is FP8:
        return scaled.clamp(values.least, values.largest).to(torch.float8_e4m3fn).float()
    return scaled.round_().clamp_(values.least, values.largest)


def quantise(rows: torch.Tensor, values: Values, block: int, dtype: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] as q, float32 [out, in], and scales [out, in / block], stored as `dtype`."""
    scales = block_scales(rows, values, block, dtype)
    blocks = rows.reshape(len(rows), -1, block)
    return round_to(blocks / scales[..., None], values).reshape(rows.shape), scales


def block_scales(
    rows: torch.Tensor, values: Values, block: int, dtype: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales [out, in / block] of weights [out, in], stored as `dtype`.

    With `importance`, [in], the mean square of what each input carries, a block's range is clipped where that makes the
    product's error smaller: the largest weights are rounded worse so that the others are rounded better.
    """
    blocks = rows.reshape(len(rows), -1, block)
    low, high = blocks.aminmax(dim=-1)
    steps = torch.maximum(low / values.least, high / values.largest)  # both sides fit, and the larger one just so
    if importance is not None:
        steps = steps * _clips(blocks, steps, values, dtype, importance.reshape(-1, block))
    return stored(steps, dtype)


def dequantised(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """q [out, in] times its scales [out, in / block]."""
    return (q.reshape(*scales.shape, -1) * scales[..., None]).reshape(q.shape)


def _clips(blocks: torch.Tensor, steps: torch.Tensor, values: Values, dtype: int, importance: torch.Tensor) -> torch.Tensor:
    """The share of the range, [out, blocks], that gives Σ importance · (w - q · scale)² its least value."""
    least, best = torch.full_like(steps, torch.inf), torch.ones_like(steps)
    for clip in CLIPS:
        scales = stored(steps * clip, dtype)[..., None]
        error = (((round_to(blocks / scales, values) * scales) - blocks).square() * importance).sum(-1)
        best = torch.where(error < least, clip, best)
        least = torch.minimum(error, least)
    return best


def packed(q: torch.Tensor, values: Values) -> torch.Tensor:
    """q [out, in] as the bytes of [in, out]: uint8 [in, out], or of 4-bit pairs, the low one first, [in, out / 2]."""
    if values is FP8:
        return q.to(torch.float8_e4m3fn).view(torch.uint8).T
    small = q.to(torch.int8)
    if values.bits == 4:
        small = small[0::2].bitwise_and_(0xF).bitwise_or_(small[1::2] << 4)
    return small.view(torch.uint8).T


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """float32, of what numpy has as float16, float32 or (ml_dtypes') bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array, order="C").view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array)).float()


def to_bytes(tensor: torch.Tensor, dtype: int) -> np.ndarray:
    """The tensor as bytes of the float type `dtype`, uint8."""
    return tensor.contiguous().to(torch_dtype(dtype)).view(torch.uint8).numpy()

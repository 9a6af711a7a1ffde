"""QUANTIZE and DEQUANTIZE: one scale for all, one along an axis, or one a block."""

import torch

from suture.core.network.description import Layer
from suture.core.network.dtypes import TORCH, to_e2m1, widen

RANGES = {"INT8": (-128, 127), "INT4": (-8, 7), "FP8": (-448.0, 448.0), "FP4": (-6.0, 6.0)}


def quantize(layer: Layer, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """clamp(round(x / scale) + zero_point), rounding half to even."""
    target = layer.attributes["to_type"]
    low, high = RANGES[target]
    scaled = widen(x) / _spread(widen(scale), x, layer.attributes["axis"])
    if target in ("INT8", "INT4"):
        scaled = scaled.round()
    if zero_point is not None:
        scaled = scaled + _spread(zero_point, x, layer.attributes["axis"]).float()
    clamped = scaled.clamp(low, high)
    return (to_e2m1(clamped) if target == "FP4" else clamped).to(TORCH[target])


def dequantize(layer: Layer, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """(x - zero_point) · scale."""
    values = x.float()
    if zero_point is not None:
        values = values - _spread(zero_point, x, layer.attributes["axis"]).float()
    return (values * _spread(scale, x, layer.attributes["axis"]).float()).to(TORCH[layer.attributes["to_type"]])


def _spread(parameter: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Scale or zero point in a shape that broadcasts to x."""
    if parameter.numel() == 1:
        return parameter.reshape([1] * x.ndim)
    if parameter.ndim == 1:
        return parameter.reshape([-1 if dimension == axis % x.ndim else 1 for dimension in range(x.ndim)])
    for dimension, (blocks, size) in enumerate(zip(parameter.shape, x.shape)):
        if blocks not in (1, size):
            if size % blocks:
                raise ValueError(f"{blocks} blocks do not divide axis {dimension} of length {size}")
            parameter = parameter.repeat_interleave(size // blocks, dim=dimension)
    return parameter

"""Layers that sum: MATRIX_MULTIPLY, EINSUM, REDUCE, CUMULATIVE, TOPK, SOFTMAX, NORMALIZATION.

16-bit floats are accumulated in float32 and rounded once at the end, as TensorRT's kernels do.
"""

import math

import torch

from suture.core.network.description import Layer
from suture.core.network.dtypes import TORCH, widen

REDUCTIONS = {
    "SUM": lambda x, axes: x.sum(axes, keepdim=True),
    "AVG": lambda x, axes: x.mean(axes, keepdim=True),
    "MAX": lambda x, axes: _extreme(torch.amax, x, axes, largest=False),
    "MIN": lambda x, axes: _extreme(torch.amin, x, axes, largest=True),
}


def _extreme(function, x: torch.Tensor, axes: list[int], largest: bool) -> torch.Tensor:
    """Of nothing: what any number is compared with first, the least or the largest that there is."""
    if all(x.shape[axis] for axis in axes):
        return function(x, axes, keepdim=True)
    if x.is_floating_point():
        value = float("inf") if largest else float("-inf")
    else:
        value = torch.iinfo(x.dtype).max if largest else torch.iinfo(x.dtype).min
    return x.new_full([1 if axis in axes else size for axis, size in enumerate(x.shape)], value)


def axes_of(mask: int, rank: int) -> list[int]:
    """The axes whose bits are set."""
    return [axis for axis in range(rank) if mask >> axis & 1]


def matrix_multiply(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    left, right = layer.attributes["op0"], layer.attributes["op1"]
    x = widen(a).unsqueeze(-2) if left == "VECTOR" else widen(a)
    y = widen(b).unsqueeze(-1) if right == "VECTOR" else widen(b)
    product = torch.matmul(x.mT if left == "TRANSPOSE" else x, y.mT if right == "TRANSPOSE" else y)
    product = product.squeeze(-2) if left == "VECTOR" else product
    product = product.squeeze(-1) if right == "VECTOR" else product
    return product.to(a.dtype)


def einsum(layer: Layer, *operands: torch.Tensor) -> torch.Tensor:
    return torch.einsum(layer.attributes["equation"], *map(widen, operands)).to(operands[0].dtype)


def reduce(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    axes, operation = axes_of(layer.attributes["axes"], x.ndim), layer.attributes["op"]
    result = widen(x)
    if operation == "PROD":
        for axis in axes:
            result = result.prod(axis, keepdim=True)
    elif axes:
        result = REDUCTIONS[operation](result, axes)
    if not layer.attributes["keep_dims"]:
        result = result.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])
    return result.to(x.dtype)


def cumulative(layer: Layer, x: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    along = int(axis.item()) % x.ndim
    y = widen(x).flip(along) if layer.attributes["reverse"] else widen(x)
    total = y.cumsum(along)
    if layer.attributes["exclusive"]:
        total = total - y
    return (total.flip(along) if layer.attributes["reverse"] else total).to(x.dtype)


def top_k(layer: Layer, x: torch.Tensor, count: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted; of equal values the one that comes first."""
    (axis,) = axes_of(layer.attributes["axes"], x.ndim)
    k = layer.attributes["k"] if count is None else int(count.item())
    values, places = x.sort(dim=axis, descending=layer.attributes["op"] == "MAX", stable=True)
    return values.narrow(axis, 0, k), places.narrow(axis, 0, k).to(TORCH[layer.attributes["indices_type"]])


def softmax(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    (axis,) = axes_of(layer.attributes["axes"], x.ndim)
    return widen(x).softmax(axis).to(x.dtype)


def normalization(layer: Layer, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(x - mean) / √(variance + ε) · scale + bias. With groups, the channels of a group share their statistics."""
    groups, axes = layer.attributes["num_groups"], axes_of(layer.attributes["axes"], x.ndim)
    y = widen(x)
    if groups > 1:  # split channels; statistics over a group's channels and the given axes behind them
        y = y.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        axes = [2, *(axis + 1 for axis in axes if axis > 1)]
    variance, mean = torch.var_mean(y, axes, correction=0, keepdim=True)
    y = ((y - mean) / torch.sqrt(variance + layer.attributes["epsilon"])).reshape(x.shape)
    return (y * _channelwise(widen(scale), x, groups) + _channelwise(widen(bias), x, groups)).to(x.dtype)


def _channelwise(weights: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Scale or bias in a shape that broadcasts to x: per group where there is one value a group."""
    if groups > 1 and weights.ndim == x.ndim and weights.shape[1] == groups:
        return weights.repeat_interleave(x.shape[1] // groups, dim=1)
    if weights.ndim == 1 and x.ndim > 2 and math.prod(weights.shape) == x.shape[1]:
        return weights.reshape([-1] + [1] * (x.ndim - 2))
    return weights

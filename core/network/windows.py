"""Layers that look through a window: CONVOLUTION, DECONVOLUTION, POOLING, LRN; and PADDING and SCALE, which stand beside them.

x is [N, C, ...] with one to three dimensions behind the channels. 16-bit floats are accumulated in float32 and rounded once.
"""

import math

import torch
from torch.nn import functional

from suture.core.network.description import Layer, Packed
from suture.core.network.dtypes import to_torch, unpack, widen

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def convolution(layer: Layer, x: torch.Tensor, *dynamic: torch.Tensor) -> torch.Tensor:
    """Kernel [maps, C / groups, ...] and bias are inputs where there are such, attributes otherwise."""
    attributes, groups = layer.attributes, layer.attributes["num_groups"]
    window = attributes["kernel_size_nd"]
    kernel, bias = _parameters(attributes, x, dynamic, (attributes["num_output_maps"], x.shape[1] // groups, *window))
    padded = functional.pad(widen(x), _flat(_paddings(attributes, x.shape[2:], window, attributes["dilation_nd"])))
    return CONVOLUTIONS[len(window)](
        padded, kernel, bias, stride=attributes["stride_nd"], dilation=attributes["dilation_nd"], groups=groups
    ).to(x.dtype)


def deconvolution(layer: Layer, x: torch.Tensor, *dynamic: torch.Tensor) -> torch.Tensor:
    """Kernel [C, maps / groups, ...]. Padding is what is cut off at the ends: a negative one adds zeros there."""
    attributes, groups = layer.attributes, layer.attributes["num_groups"]
    window = attributes["kernel_size_nd"]
    kernel, bias = _parameters(attributes, x, dynamic, (x.shape[1], attributes["num_output_maps"] // groups, *window))
    spread = TRANSPOSED[len(window)](
        widen(x), kernel, None, stride=attributes["stride_nd"], dilation=attributes["dilation_nd"], groups=groups
    )
    if attributes["padding_mode"].startswith("EXPLICIT"):
        cut = [*zip(attributes["pre_padding"], attributes["post_padding"])]
    else:  # SAME: as many outputs as length · stride
        more = [size - length * stride for size, length, stride in zip(spread.shape[2:], x.shape[2:], attributes["stride_nd"])]
        cut = [_halves(size, attributes["padding_mode"]) for size in more]
    result = functional.pad(spread, _flat((-before, -after) for before, after in cut))
    if bias is not None:
        result = result + bias.reshape([-1] + [1] * len(window))
    return result.to(x.dtype)


def pooling(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """MAX, or AVERAGE over the window's places inside the input (`average_count_excludes_padding`) or the padded input."""
    attributes, window = layer.attributes, layer.attributes["window_size_nd"]
    kind, strides, lengths = attributes["type"], attributes["stride_nd"], x.shape[x.ndim - len(window) :]
    sides = _paddings(attributes, lengths, window, [1] * len(window))
    over = []  # what rounding up adds behind the padding
    for axis, (size, stride) in enumerate(zip(window, strides)):
        left = (lengths[axis] + sum(sides[axis]) - size) % stride
        over.append((stride - left) % stride if attributes["padding_mode"] == "EXPLICIT_ROUND_UP" else 0)
    grown = [(before, after + more) for (before, after), more in zip(sides, over)]

    def windows(values: torch.Tensor, outside: float) -> torch.Tensor:
        padded = functional.pad(values, _flat(grown), value=outside)
        for axis, (size, stride) in enumerate(zip(window, strides)):
            padded = padded.unfold(x.ndim - len(window) + axis, size, stride)
        return padded.flatten(x.ndim)

    wide = widen(x) if x.is_floating_point() else x
    if kind == "MAX":
        lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        return windows(wide, lowest).amax(-1).to(x.dtype)
    if kind != "AVERAGE":
        raise ValueError(f"pooling of type {kind}")
    counted = torch.ones_like(wide)
    if attributes["average_count_excludes_padding"]:
        counts = windows(counted, 0.0).sum(-1)
    else:
        counted = functional.pad(counted, _flat(sides), value=1.0)
        counted = functional.pad(counted, _flat([(0, more) for more in over]))
        for axis, (size, stride) in enumerate(zip(window, strides)):
            counted = counted.unfold(x.ndim - len(window) + axis, size, stride)
        counts = counted.flatten(x.ndim).sum(-1)
    return (windows(wide, 0.0).sum(-1) / counts).to(x.dtype)


def lrn(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """x / (k + alpha / n · Σ x² over n channels around) ^ beta."""
    size, alpha, beta, k = (layer.attributes[key] for key in ("window_size", "alpha", "beta", "k"))
    squares = functional.pad(widen(x).square(), [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2])
    sums = squares.unfold(1, size, 1).sum(-1)
    return (widen(x) / (k + alpha / size * sums) ** beta).to(x.dtype)


def padding(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Zeros around the last two dimensions; negative numbers cut."""
    return functional.pad(x, _flat(list(zip(layer.attributes["pre_padding_nd"], layer.attributes["post_padding_nd"]))))


def scale(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """(x · scale + shift) ^ power; each one value, one a channel, or one an element."""
    attributes, result = layer.attributes, widen(x)
    shape = {
        "UNIFORM": [1] * x.ndim,
        "CHANNEL": [-1 if axis == attributes["channel_axis"] else 1 for axis in range(x.ndim)],
        "ELEMENTWISE": [1, *x.shape[1:]],
    }[attributes["mode"]]
    for key, apply in (("scale", torch.mul), ("shift", torch.add), ("power", torch.pow)):
        if attributes[key] is not None:
            result = apply(result, widen(weights(attributes[key], x)).reshape(shape))
    return result.to(x.dtype)


def weights(held, x: torch.Tensor) -> torch.Tensor:
    """Weights that a layer holds, in the dtype of x."""
    if isinstance(held, str):
        raise ValueError(held)
    return to_torch(unpack(held) if isinstance(held, Packed) else held, x.dtype).to(x.device)


def _parameters(attributes: dict, x: torch.Tensor, dynamic, shape) -> tuple[torch.Tensor, torch.Tensor | None]:
    kernel, bias = [*dynamic, None, None][:2]
    if kernel is None:
        kernel = weights(attributes["kernel"], x).reshape(shape)
    if bias is None and attributes["bias"] is not None:
        bias = weights(attributes["bias"], x)
    return widen(kernel), None if bias is None else widen(bias)


def _paddings(attributes: dict, lengths, window, dilations) -> list[tuple[int, int]]:
    """Before and behind each axis. SAME: as many outputs as ⌈length / stride⌉, an odd one at the end (UPPER) or in front."""
    mode = attributes["padding_mode"]
    if mode.startswith("EXPLICIT"):
        return list(zip(attributes["pre_padding"], attributes["post_padding"]))
    sides = []
    for length, size, stride, dilation in zip(lengths, window, attributes["stride_nd"], dilations):
        total = max((math.ceil(length / stride) - 1) * stride + dilation * (size - 1) + 1 - length, 0)
        sides.append(_halves(total, mode))
    return sides


def _halves(total: int, mode: str) -> tuple[int, int]:
    return (total // 2, total - total // 2) if mode == "SAME_UPPER" else (total - total // 2, total // 2)


def _flat(sides) -> list[int]:
    """In the order of torch's pad: the last axis first."""
    return [size for pair in reversed(list(sides)) for size in pair]

"""Layers that read between elements: RESIZE and GRID_SAMPLE, with TensorRT's coordinates, rounding and weights."""

import math

import torch
from torch.nn import functional

from suture.core.network.description import Layer
from suture.core.network.dtypes import widen

ROUNDINGS = {
    "HALF_UP": lambda x: torch.floor(x + 0.5),
    "HALF_DOWN": lambda x: torch.ceil(x - 0.5),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}
GRID_MODES = {"LINEAR": "bilinear", "NEAREST": "nearest", "CUBIC": "bicubic"}
OUTSIDE = {"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}


def resize(layer: Layer, x: torch.Tensor, dimensions: torch.Tensor | None = None) -> torch.Tensor:
    """Axis by axis. The new lengths are an input, or `shape`, or ⌊length · scale⌋; a scale that is not given is their ratio."""
    attributes = layer.attributes
    scales = attributes["scales"]
    if dimensions is not None:
        sizes = dimensions.tolist()
    elif scales is not None and len(scales):
        sizes = [math.floor(length * scale) for length, scale in zip(x.shape, scales)]
    else:
        sizes = attributes["shape"]
    given = dimensions is None and scales is not None and len(scales) == x.ndim
    result = widen(x) if x.is_floating_point() else x
    for axis, (length, size) in enumerate(zip(x.shape, sizes)):
        scale = scales[axis] if given else size / length
        if size == length and scale == 1:
            continue
        places = _coordinates(attributes, length, size, scale).to(x.device)
        if attributes["resize_mode"] == "NEAREST":
            index = ROUNDINGS[attributes["nearest_rounding"]](places).long().clamp(0, length - 1)
            result = result.index_select(axis, index)
        else:
            weights = _weights(attributes, places, length).to(result.dtype)
            result = torch.tensordot(result, weights, ([axis], [1])).movedim(-1, axis)
    return result.to(x.dtype)


def _coordinates(attributes: dict, length: int, size: int, scale: float) -> torch.Tensor:
    """Where in the input, in elements, each output lies; in float32, as kernels compute it."""
    places = torch.arange(size, dtype=torch.float32)
    kind = attributes["coordinate_transformation"]
    if size == 1 and (attributes["selector_for_single_pixel"] == "UPPER" or kind == "ALIGN_CORNERS"):
        return torch.zeros(1)
    if kind == "ALIGN_CORNERS":
        return places * (length - 1) / (size - 1)
    if kind == "ASYMMETRIC":
        return places / scale
    return (places + 0.5) / scale - 0.5


def _weights(attributes: dict, places: torch.Tensor, length: int) -> torch.Tensor:
    """[outputs, inputs]: what each input adds to each output. What lies outside is the edge's element, or left out."""
    first = places.floor()
    part = places - first
    if attributes["resize_mode"] == "LINEAR":
        taps = {0: 1 - part, 1: part}
    else:
        taps = _cubic(part, attributes["cubic_coeff"])
    result = torch.zeros(len(places), length, device=places.device)
    rows = torch.arange(len(places), device=places.device)
    for offset, weight in taps.items():
        column = first + offset
        if attributes["exclude_outside"]:
            weight = torch.where((column >= 0) & (column < length), weight, 0.0)
        result.index_put_((rows, column.clamp(0, length - 1).long()), weight, accumulate=True)
    return result / result.sum(1, keepdim=True) if attributes["exclude_outside"] else result


def _cubic(part: torch.Tensor, a: float) -> dict[int, torch.Tensor]:
    """Keys' kernel over the four elements around."""

    def near(t):
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t):
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return {-1: far(part + 1), 0: near(part), 1: near(1 - part), 2: far(2 - part)}


def grid_sample(layer: Layer, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] or [N, C, D, H, W] at grid [N, ..., 2 or 3], whose coordinates run from -1 to 1."""
    attributes = layer.attributes
    return functional.grid_sample(
        widen(x),
        widen(grid),
        mode=GRID_MODES[attributes["interpolation_mode"]],
        padding_mode=OUTSIDE[attributes["sample_mode"]],
        align_corners=attributes["align_corners"],
    ).to(x.dtype)

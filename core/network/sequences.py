"""Layers over sequences and boxes: REVERSE_SEQUENCE, RAGGED_SOFTMAX, NMS."""

import torch

from suture.core.network.description import Layer
from suture.core.network.dtypes import TORCH, widen


def reverse_sequence(layer: Layer, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of each row of the batch the first lengths[row] elements turned round."""
    batch, sequence = layer.attributes["batch_axis"], layer.attributes["sequence_axis"]
    ordered = x.movedim((batch, sequence), (0, 1)).clone()
    for row, length in enumerate(lengths.tolist()):
        ordered[row, :length] = ordered[row, :length].flip(0)
    return ordered.movedim((0, 1), (batch, sequence))


def ragged_softmax(layer: Layer, x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Softmax over the first bounds[row] elements of each row; zero behind them."""
    inside = torch.arange(x.shape[-1], device=x.device) < bounds
    return widen(x).masked_fill(~inside, float("-inf")).softmax(-1).masked_fill(~inside, 0).to(x.dtype)


def nms(
    layer: Layer,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    most: torch.Tensor | None = None,
    overlap: torch.Tensor | None = None,
    least: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """boxes [B, N, 4] or [B, N, 1 or classes, 4] and scores [B, N, classes] to the rows (batch, class, box) of those kept, best first,
    and their number. A box is left out where its overlap with a better one of its class is greater than `overlap`."""
    most, overlap, least = (None if value is None else value.item() for value in (most, overlap, least))
    boxes = boxes.unsqueeze(2) if boxes.ndim == 3 else boxes
    kept = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[2]):
            own = _corners(boxes[batch, :, min(kind, boxes.shape[2] - 1)].float(), layer.attributes["bounding_box_format"])
            marks = scores[batch, :, kind].float()
            chosen: list[int] = []
            for box in marks.sort(descending=True, stable=True).indices.tolist():
                if least is not None and marks[box] <= least:
                    break
                if len(chosen) == (most or 0):
                    break
                if all(_overlap(own[box], own[other]) <= (overlap or 0) for other in chosen):
                    chosen.append(box)
            kept += [(batch, kind, box) for box in chosen]
    dtype = TORCH[layer.attributes["indices_type"]]
    return torch.tensor(kept, dtype=dtype).reshape(-1, 3), torch.tensor(len(kept), dtype=torch.int32)


def _corners(boxes: torch.Tensor, form: str) -> torch.Tensor:
    if form == "CENTER_SIZES":
        center, size = boxes[:, :2], boxes[:, 2:]
        return torch.cat((center - size / 2, center + size / 2), 1)
    first, second = boxes[:, :2], boxes[:, 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), 1)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Intersection over union."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    common = sides.prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common
    return (common / union).item() if union > 0 else 0.0

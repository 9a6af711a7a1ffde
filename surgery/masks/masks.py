"""What an attention mask lets through and adds, found by evaluating its subgraph on probes, whatever nodes it is made of."""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.additive_mask import FAR_BELOW
from suture.surgery.graph import Graph, onnx_type, producer, through
from suture.surgery.masks.mask_probe import SHORT, Probe, evaluate, probes

BOOL = 9
LONGEST_WINDOW = 1 << 17


class Kind(Enum):
    CAUSAL = "causal"
    CAUSAL_PADDED = "causal and padding"
    PADDED = "padding"
    ALL = "nothing is masked"


@dataclass(frozen=True)
class Mask:
    """A mask that is understood: which slots count, and what is added to their scores."""

    kind: Kind
    window: int | None = None  # a token sees this many slots, its own among them
    slopes: tuple[float, ...] | None = None  # ALiBi: head h adds slopes[h] * (slot - own slot)
    bias: gs.Tensor | None = None  # whatever else is added to the scores of the slots that count

    @property
    def causal(self) -> bool:
        return self.kind in (Kind.CAUSAL, Kind.CAUSAL_PADDED)


def recognise(graph: Graph, mask: gs.Tensor) -> Mask | str:
    """What the mask is, or the reason why it is nothing known."""
    found = _recognise(graph, mask)
    if isinstance(found, Mask):
        return found
    where = producer(through(mask, "Cast"), "Where")  # of a bias that weights decide, for the slots that count
    hidden = graph.scalar(where.inputs[2]) if where is not None else None
    visible = _recognise(graph, where.inputs[0]) if hidden is not None and hidden <= FAR_BELOW else None
    whole = isinstance(visible, Mask) and visible.kind is Kind.PADDED and graph.signature.bidirectional
    return replace(visible, bias=where.inputs[1]) if whole else found


def _recognise(graph: Graph, mask: gs.Tensor) -> Mask | str:
    lengths = _lengths(graph, mask)
    windowed = ((Kind.CAUSAL, False), (Kind.CAUSAL_PADDED, False), (Kind.CAUSAL_PADDED, True))
    matching: list[tuple[Kind, int | None, bool]] = [(kind, None, False) for kind in Kind]
    matching += [(kind, length, places) for length in sorted(lengths) for kind, places in windowed]
    slopes: np.ndarray | None = None
    short, long = SHORT, tuple((1, 2, length + 3) for length in sorted(lengths) if length > 8)
    if (
        evaluate(graph, [mask], probes(graph, short)[0]) is None
    ):  # some take a prompt or one more token, but no chunk over a cache
        short = [each for batch, new, past in SHORT for each in ((batch, new + past, 0), (batch, 1, new + past - 1))]
        long = [(batch, 1, new + past - 1) for batch, new, past in long]
    short = probes(graph, short)
    for probe in [*short, *probes(graph, long)]:
        values = evaluate(graph, [mask], probe)
        if values is None and any(probe is one for one in short):
            return "the mask depends on more than positions, padding and lengths"
        if values is None:
            continue  # longer than the graph itself can take
        bias = values[0].reshape((1,) * (4 - values[0].ndim) + values[0].shape)
        visible = bias if onnx_type(mask) == BOOL else bias > FAR_BELOW
        if onnx_type(mask) != BOOL and np.any(bias[visible] != 0) and probe.mask[0].all():
            found = _slopes(bias.astype(np.float64), probe, float(np.finfo(bias.dtype).eps))
            if found is None or (slopes is not None and not np.allclose(found, slopes, rtol=2e-3)):
                return "the mask adds numbers that are not a slope times a distance: it is a bias"
            slopes = found
        matching = [each for each in matching if _agrees(visible, _expected(*each, probe))]
    if not matching:
        return "the mask is neither causal nor padding nor a window"
    kind, window, _ = matching[0]  # slots of a static cache are places: padding lies in none of them
    return Mask(kind, window, None if slopes is None else tuple(slopes.tolist()))


def _lengths(graph: Graph, mask: gs.Tensor) -> set[int]:
    """Constants above the mask: a window or a chunk shows only beyond its length, which stands somewhere there."""
    lengths = set()
    stack, seen = [mask], set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        number = graph.scalar(tensor)
        if number is not None and 1 < abs(number) <= LONGEST_WINDOW:
            lengths |= {abs(int(number)), abs(int(number)) + 1}  # compared with < or <=
        for node in tensor.inputs:
            stack += node.inputs
    return lengths


def _slopes(bias: np.ndarray, probe: Probe, epsilon: float) -> np.ndarray | None:
    """float64 [heads], if a probe's first row, which has no padding, adds slope * (slot - own slot) to what it sees, up to
    what is the same for all slots of a token: the softmax takes that out."""
    rows = probe.past + np.arange(probe.steps)
    distance = np.arange(bias.shape[-1]) - rows[:, None]
    causal = distance <= 0
    if bias.shape[-2] not in (1, probe.steps) or bias.shape[-1] != probe.past + probe.steps or rows[-1] == 0:
        return None
    first = np.broadcast_to(bias[0], (bias.shape[1], probe.steps, bias.shape[-1]))
    relative = first - np.take_along_axis(first, np.broadcast_to(rows[None, :, None], (*first.shape[:2], 1)), axis=-1)
    slopes = relative[:, -1, 0] / distance[-1, 0]
    expected = slopes[:, None, None] * distance
    error = np.abs(relative - expected)[:, causal]
    rounding = epsilon * np.abs(first[:, causal]).max()  # of slope * slot, from which the slot itself is reckoned here
    return slopes if np.all(error <= 2e-3 * np.abs(expected[:, causal]) + rounding + 1e-6) else None


def _expected(kind: Kind, window: int | None, places: bool, probe: Probe) -> np.ndarray:
    """bool [B, 1, S, T]. A window counts slots, or `places`: slots without those of padding."""
    total = probe.past + probe.steps
    rows = probe.past + np.arange(probe.steps)[:, None]
    slots = np.arange(total)[None, :]
    visible = np.ones((probe.batch, 1, probe.steps, total), bool)
    if kind in (Kind.CAUSAL, Kind.CAUSAL_PADDED):
        visible &= slots <= rows
    if kind in (Kind.PADDED, Kind.CAUSAL_PADDED):
        visible &= (probe.mask != 0)[:, None, None, :]
    if window is None:
        return visible
    counted = probe.mask.cumsum(1) if places else np.broadcast_to(np.arange(total), (probe.batch, total))
    return visible & (counted[:, None, None, :] > counted[:, None, probe.past :, None] - window)


def _agrees(visible: np.ndarray, expected: np.ndarray) -> bool:
    """Equal, except in rows that see nothing and so mean nothing (exporters open those up to avoid NaN)."""
    try:
        visible, expected = np.broadcast_arrays(visible, expected)
    except ValueError:
        return False
    rows = expected.any(-1)
    return bool(np.array_equal(visible[rows], expected[rows]))

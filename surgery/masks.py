"""What an attention mask lets through, found by evaluating its subgraph on probes, whatever nodes it is made of."""

from enum import Enum

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import Graph, onnx_type
from surgery.probe import Probe, evaluate, probes

BOOL = 9
FAR_BELOW = -1e3  # a bias at most this hides a slot


class Mask(Enum):
    CAUSAL = "causal"
    CAUSAL_PADDED = "causal and padding"
    PADDED = "padding"
    ALL = "nothing is masked"


def recognise(graph: Graph, mask: gs.Tensor) -> Mask | str:
    """The kind of mask, or the reason why it is none of the known ones."""
    matching = list(Mask)
    for probe in [*probes(), *_long_probes(graph, mask)]:
        values = evaluate(graph, [mask], probe)
        if values is None:
            return "the mask depends on more than positions, padding and lengths"
        visible = _visible(values[0], onnx_type(mask))
        if visible is None:
            return "the mask adds values between 0 and -1000: it is a bias"
        matching = [kind for kind in matching if _agrees(visible, _expected(kind, probe))]
    if not matching:
        return "the mask is neither causal nor padding nor both"
    return matching[0]


def _long_probes(graph: Graph, mask: gs.Tensor) -> list[Probe]:
    """A window or a chunk shows only beyond its length, which stands somewhere above the mask as a constant."""
    lengths = {1}
    stack, seen = [mask], set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        number = graph.scalar(tensor)
        if number is not None and abs(number) <= 1 << 17:
            lengths.add(abs(int(number)))
        for node in tensor.inputs:
            stack += node.inputs
    return probes(tuple((1, 2, length + 3) for length in sorted(lengths) if length > 8))


def _visible(values: np.ndarray, dtype: int) -> np.ndarray | None:
    """bool [B, heads, S, T]; None where a value neither lets through nor hides."""
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    if dtype == BOOL:
        return values
    hidden = values <= FAR_BELOW
    return ~hidden if np.all(hidden | (values == 0)) else None


def _expected(kind: Mask, probe: Probe) -> np.ndarray:
    """bool [B, 1, S, T]."""
    total = probe.past + probe.steps
    rows = probe.past + np.arange(probe.steps)
    causal = (np.arange(total)[None, :] <= rows[:, None])[None, None]
    padding = (probe.mask != 0)[:, None, None, :]
    everything = np.ones((probe.batch, 1, probe.steps, total), bool)
    if kind is Mask.CAUSAL:
        return causal & everything
    if kind is Mask.CAUSAL_PADDED:
        return causal & padding
    return padding & everything if kind is Mask.PADDED else everything


def _agrees(visible: np.ndarray, expected: np.ndarray) -> bool:
    """Equal, except in rows that see nothing and so mean nothing (exporters open those up to avoid NaN)."""
    try:
        visible, expected = np.broadcast_arrays(visible, expected)
    except ValueError:
        return False
    rows = expected.any(-1)
    return bool(np.array_equal(visible[rows], expected[rows]))

"""Where a graph works out positions itself, from the cache's length or from the attention mask, found by probing."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, onnx_type, op_of, rank, static_dim
from suture.surgery.masks.mask_probe import Probe, evaluate, probes

INTEGERS = (6, 7)  # int32, int64
SPREADS = ("Gather", "Unsqueeze", "Cast", "Mul", "MatMul", "Add", "Sub")  # take [B, S] where they took [1, S]
NARROWS = ("Unsqueeze", "Cast", "Mul", "Add", "Sub", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal",
           "Where", "Max", "Min", "Clip", "Abs", "Neg")  # take [1, T] where they took [B, T]  # fmt: skip


@dataclass(frozen=True)
class Positions:
    """A tensor that holds each token's position + offset, or, `of_slots`, each slot's, its axes besides the tokens' (axis 0:
    batch, `axis`: sequence) of size 1."""

    tensor: gs.Variable
    offset: int
    axis: int
    consumers: list[gs.Node]  # that take it for something else than more positions
    of_slots: bool = False


def find_positions(graph: Graph, sources: list[gs.Node], live: set[int], of_slots: bool = False) -> list[Positions]:
    """The positions that live nodes below `sources` work out, of the step's tokens or of all slots. Raises NoMatch where
    one of them is used as if it were the same for all rows, or, of slots, as if it were not."""
    found: dict[int, tuple[gs.Variable, int, int, bool]] = {}
    for tensor in _below(sources, live):
        place = _positions(graph, tensor, of_slots)
        if place is not None:
            found[id(tensor)] = (tensor, *place)
    result = []
    for tensor, offset, axis, one_row in found.values():
        users = [node for node in tensor.outputs if id(node) in live and not all(id(t) in found for t in node.outputs)]
        for node in users:
            if of_slots:
                need(op_of(node) in NARROWS, f"slots are not the same for all rows in {node.op} {node.name}")
            else:
                need(not one_row or op_of(node) in SPREADS, f"positions are the same for all rows in {node.op} {node.name}")
        if users:
            result.append(Positions(tensor, offset, axis, users, of_slots))
    return result


def known_positions(graph: Graph, most: int) -> tuple[int, str] | None:
    """How many positions the graph has a row for, and the node that looks them up: the least of its tables of learned
    positions and of rotary angles. None where it has no such table, or `most` positions are within it."""
    limits = [(limit, node.name) for node in graph.nodes("GatherElements") if (limit := _tried(graph, node, most)) is not None]
    places = {}
    for node, table, index in _lookups(graph):
        if isinstance(table, gs.Constant) and rank(table) > 1 and onnx_type(index) in INTEGERS and rank(index) in (2, 3, 4):
            if id(index) not in places:
                places[id(index)] = _positions(graph, index)
            if (place := places[id(index)]) is not None:
                limits.append((static_dim(table, 0) - place[0], node.name))
    return min(((limit, name) for limit, name in limits if limit < most), default=None)


def _tried(graph: Graph, lookup: gs.Node, most: int) -> int | None:
    """How many positions a lookup takes, where its table is computed: found by looking up the last of them."""

    def takes(count: int) -> bool:
        return evaluate(graph, lookup.outputs[:1], probes(graph, ((1, 1, count - 1),))[0]) is not None

    if not takes(1) or takes(most):
        return None
    return bisect_left(range(1, most), True, key=lambda count: not takes(count + 1)) + 1


def _lookups(graph: Graph) -> Iterator[tuple[gs.Node, gs.Tensor, gs.Tensor]]:
    """Each node that takes rows of a table, with the table and what says which rows."""
    for node in graph.nodes("Gather"):
        if not node.attrs.get("axis", 0):
            yield node, node.inputs[0], node.inputs[1]
    for node in graph.nodes("RotaryEmbedding"):
        if len(node.inputs) > 3:
            yield node, node.inputs[1], node.inputs[3]


def _below(sources: list[gs.Node], live: set[int]) -> list[gs.Variable]:
    """Integer tensors of rank 2 to 4 that live nodes compute from the outputs of `sources` through integers alone."""
    stack, seen, tensors = list(sources), set(), []
    while stack:
        node = stack.pop()
        if id(node) in seen or id(node) not in live:
            continue
        seen.add(id(node))
        for tensor in node.outputs:
            if onnx_type(tensor) in INTEGERS:
                stack += tensor.outputs
                if rank(tensor) in (2, 3, 4):
                    tensors.append(tensor)
    return tensors


def _positions(graph: Graph, tensor: gs.Variable, of_slots: bool = False) -> tuple[int, int, bool] | None:
    """Offset, the sequence's axis, and whether all rows share one; None if the tensor holds something else."""
    offset, axis, one_row = None, None, True
    for probe in probes(graph):
        width = probe.past + probe.steps if of_slots else probe.steps
        values = evaluate(graph, [tensor], probe)
        if values is None or values[0].size not in (width, probe.batch * width):
            return None
        shape = values[0].shape
        if axis is None:  # the first probe's batch, steps and lengths all differ
            axis = next((i for i, size in enumerate(shape) if i and size == width), None)
        if axis is None or shape[axis] != width or values[0].size != shape[0] * shape[axis]:
            return None
        one_row = one_row and shape[0] == 1
        found = _offset(np.broadcast_to(values[0].reshape(shape[0], width), (probe.batch, width)), probe)
        if found is None or offset not in (None, found):
            return None
        offset = found
    return offset, axis, one_row


def _offset(values_BW: np.ndarray, probe: Probe) -> int | None:
    """What is added to positions of the last tokens, or of all, counted with or without padding."""
    width = values_BW.shape[1]
    valid = probe.mask[:, -width:] != 0
    slots = np.broadcast_to(np.arange(probe.past + probe.steps)[-width:], values_BW.shape)
    places = np.maximum(probe.mask.cumsum(1) - 1, 0)[:, -width:]
    for expected, counts in ((slots, np.ones_like(valid)), (places, valid)):
        offsets = np.unique((values_BW - expected)[counts])
        if offsets.size == 1:
            return int(offsets[0])
    return None

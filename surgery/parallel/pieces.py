"""A rank's piece of a constant, and of what nodes are told in numbers: shapes, sizes, heads.

A piece that lies in one place of a weights file stays a reference to it; any other is written behind the graph's own weights,
a slab at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from suture.core.errors import UserError
from suture.core.tensors import stored_size
from suture.surgery.graph import Graph, input_of, onnx_type, producer, set_inputs
from suture.surgery.graph.weights import SLAB, add_weight, place, read_bytes, refer
from suture.surgery.parallel.placement import Placement
from suture.surgery.parallel.relations import Placements

HEADS = {"RotaryEmbedding": {"num_heads": "X"}, "Attention": {"q_num_heads": "Q", "kv_num_heads": "K"}}  # attributes, by whose
Cuts = dict[tuple[str, Placement, int], LazyValues]


@dataclass
class Pieces:
    """Of one rank, for nodes of `graph`, which is its own or that of all ranks; each constant and each shape is cut once. `cuts`:
    pieces by constant, placement and rank, which the graphs made of one whole share."""

    graph: Graph
    rank: int
    ranks: int
    cuts: Cuts
    known: dict[tuple, gs.Tensor] = field(default_factory=dict)

    def constant(self, constant: gs.Constant, placement: Placement) -> gs.Constant:
        key = constant.name, placement, self.rank
        if key not in self.cuts:
            self.cuts[key] = self._cut(constant, placement)._values
        return self._once(key, lambda: gs.Constant(self.cuts[key].tensor.name, self.cuts[key]))

    def tell(self, node: gs.Node, placements: Placements) -> None:
        """Changes the numbers that a node is told to those of this rank. `placements`: of all its tensors."""
        for attribute, name in HEADS.get(node.op, {}).items():
            tensor = input_of(node, name)
            if attribute in node.attrs and tensor is not None and tensor.name in placements:
                placement = placements[tensor.name]
                node.attrs[attribute] = int(node.attrs[attribute]) * placement.local // placement.size
        result = placements.get(node.outputs[0].name)
        if result is not None and node.op in ("Reshape", "Expand"):
            shape = input_of(node, "shape")
            set_inputs(node, shape=self._once((id(shape), result), lambda: self._shape(node, shape, result)))
        sizes = input_of(node, "split") if node.op == "Split" else None
        if sizes is not None and placements[node.inputs[0].name].axis == node.attrs.get("axis", 0) % len(node.inputs[0].shape):
            whole = self.graph.constant(sizes)
            if whole is None:
                raise UserError(node.name, "splits at sizes that are computed", "export it with fixed heads")
            local = [_local_size(int(size), placements.get(each.name)) for size, each in zip(whole, node.outputs)]
            set_inputs(node, split=self._once((id(sizes), *local), lambda: self.graph.int64(local, sizes.name)))

        if node.op == "Slice" and node.inputs[0].name in placements:
            self._bounds(node, placements[node.inputs[0].name])

    def _bounds(self, node: gs.Node, placement: Placement) -> None:
        """Where a Slice cuts this rank's part of the axis: at the same of its parts."""
        axes = [int(axis) % len(node.inputs[0].shape) for axis in self.graph.constant(input_of(node, "axes"))]
        if placement.axis not in axes:
            return
        index = axes.index(placement.axis)
        starts, ends = (self.graph.constant(input_of(node, each)).copy() for each in ("starts", "ends"))
        first, last, _ = slice(int(starts[index]), int(ends[index])).indices(placement.size)
        starts[index], ends[index] = (_local_place(bound, placement) for bound in (first, last))
        set_inputs(node, starts=self.graph.int64(starts.tolist(), "starts"), ends=self.graph.int64(ends.tolist(), "ends"))

    def _once(self, key: tuple, make) -> gs.Tensor:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    # --- constants ------------------------------------------------------------------------------------------------------

    def _cut(self, constant: gs.Constant, placement: Placement) -> gs.Constant:
        dtype, shape = onnx_type(constant), [int(size) for size in constant.shape]
        spans = placement.spans(self.rank, self.ranks)
        local = [*shape[: placement.axis], placement.local, *shape[placement.axis + 1 :]]
        inner = stored_size(dtype) * math.prod(shape[placement.axis + 1 :])  # bytes of one element of the axis
        if any(bound * inner % 1 for span in spans for bound in span):
            raise UserError(constant.name, "a rank's part does not begin with a whole byte", "take fewer ranks, or int8")
        spans = [(int(start * inner), int(end * inner)) for start, end in spans]
        name = f"{constant.name}/rank{self.rank}"
        whole = place(constant)
        if whole is not None and len(spans) == 1 and all(size == 1 for size in shape[: placement.axis]):
            (start, end), (location, offset, _) = spans[0], whole
            return refer(self.graph, name, dtype, local, location, offset + start, end - start)
        rows = read_bytes(self.graph, constant).reshape(math.prod(shape[: placement.axis]), -1)
        return add_weight(self.graph, name, dtype, local, _slabs(rows, spans))

    # --- shapes ---------------------------------------------------------------------------------------------------------

    def _shape(self, node: gs.Node, shape: gs.Tensor, placement: Placement) -> gs.Tensor:
        """The shape tensor with this rank's size where the placement's axis is. Raises UserError where that is computed."""
        length = len(node.outputs[0].shape)
        known = self.graph.constant(shape)
        if known is not None:
            values = _local(known, placement.axis - (length - known.size), placement)
            return shape if (values == known).all() else self.graph.int64(values.tolist(), shape.name)
        joined, start = producer(shape, "Concat"), 0
        for index, part in enumerate(joined.inputs if joined is not None else ()):
            known = self.graph.constant(part)
            size = known.size if known is not None else int(part.shape[0])
            if start <= placement.axis < start + size and known is not None:
                values = _local(known, placement.axis - start, placement)
                inputs = list(joined.inputs)
                inputs[index] = self.graph.int64(values.tolist(), part.name)
                return (
                    shape if (values == known).all() else self.graph.new("Concat", inputs, {"axis": 0}, shape=list(shape.shape))
                )
            start += size
        raise UserError(node.name, f"computes the size of the divided axis {placement.axis}", "export it with fixed heads")


def _local_size(size: int, placement: Placement | None) -> int:
    return size if placement is None else placement.local


def _local_place(place: int, placement: Placement) -> int:
    """Where an end of one of the parts is on a rank."""
    before = local = 0
    for part in placement.parts:
        if before >= place:
            break
        before, local = before + part.size, local + part.local
    return local


def _local(values: np.ndarray, axis: int, placement: Placement) -> np.ndarray:
    """A shape with the size of one rank at `axis`; 0 and -1, and 1 of an axis that stays as it is, stay."""
    values = values.copy()
    if axis >= 0 and values[axis] == placement.size:
        values[axis] = placement.local
    return values


def _slabs(rows: np.ndarray, spans: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Of bytes [rows, row bytes] those columns, in rows' order."""
    step = max(SLAB // max(sum(end - start for start, end in spans), 1), 1)
    for first in range(0, len(rows), step):
        yield np.concatenate([rows[first : first + step, start:end] for start, end in spans], axis=1)

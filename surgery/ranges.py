"""Between which numbers the elements of a tensor lie, as far as a graph itself shows it."""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from suture.core.dtypes import FLOATS
from suture.surgery.graph import Graph, onnx_type, op_of, producer

Range = tuple[float | int, float | int]  # least and largest; ints of an integer tensor
INTEGERS = {TensorProto.INT32: 31, TensorProto.INT64: 63, TensorProto.UINT8: 8, TensorProto.UINT16: 16, TensorProto.UINT32: 32}
SAME = (
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Transpose",
    "Expand",
    "Identity",
    "Slice",
    "Gather",
    "GatherElements",
    "GatherND",
    "Flatten",
    "Tile",
)
UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32)


class Ranges:
    """What is asked of a graph while a pass works on it: ranges hold for the tensors that were there when they were found."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.known: dict[int, tuple[gs.Tensor, Range | None]] = {}

    def of(self, tensor: gs.Tensor) -> Range | None:
        """None where nothing is known. Of what is computed in floats the bounds hold where it is a number."""
        waiting = [tensor]
        while waiting:  # no recursion: a graph may be deep
            at = waiting[-1]
            if id(at) in self.known:
                waiting.pop()
                continue
            node = producer(at)
            missing = [each for each in (node.inputs if node else []) if not each.is_empty() and id(each) not in self.known]
            if missing and op_of(node):
                waiting += missing
                continue
            self.known[id(at)] = (at, self._found(at, node))
            waiting.pop()
        return self.known[id(tensor)][1]

    def _found(self, tensor: gs.Tensor, node: gs.Node | None) -> Range | None:
        if node is None:
            values = self.graph.constant(tensor)
            if values is None or not values.size or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                return _of_type(tensor)
            return values.min().item(), values.max().item()
        given = [self.known[id(each)][1] if id(each) in self.known else None for each in node.inputs]
        found = self._computed(node, given) if op_of(node) else None
        kind = onnx_type(tensor)
        if found is not None and kind in FLOATS:  # as kernels round what they compute: no further than they round the bound
            found = tuple(float(np.array(end, helper.tensor_dtype_to_np_dtype(kind))) for end in found)
        if found is not None and kind in INTEGERS:
            found = int(found[0]), int(found[1])
            signed = kind not in UNSIGNED
            limit = 1 << INTEGERS[kind]
            if found[1] >= limit or found[0] < (-limit if signed else 0):  # it may wrap
                found = None
        return found if found is not None else _of_type(tensor)

    def _computed(self, node: gs.Node, given: list[Range | None]) -> Range | None:
        op, first = node.op, given[0] if given else None
        if op in SAME:
            return first
        if op == "Sigmoid":
            return 0.0, 1.0
        if op == "Concat" and None not in given:
            return min(low for low, _ in given), max(high for _, high in given)
        if op == "Where" and None not in given[1:]:
            return min(low for low, _ in given[1:]), max(high for _, high in given[1:])
        if op == "Clip":
            return self._clipped(node, first)
        if op == "BitwiseAnd":
            return _masked(given)
        if op == "Mod" and not node.attrs.get("fmod", 0) and given[1] is not None and given[1][0] > 0:
            top = given[1][1] - 1
            return (0, min(first[1], top)) if first is not None and first[0] >= 0 else (0, top)
        if first is None:
            return None
        if op in ("Floor", "Ceil", "Round", "Cast"):
            return self._whole(node, first)
        if op == "Relu":
            return max(first[0], 0), max(first[1], 0)
        if op == "Neg":
            return -first[1], -first[0]
        if op == "Abs":
            low, high = sorted(map(abs, first))
            return 0 if first[0] <= 0 <= first[1] else low, high
        if len(given) == 2 and given[1] is not None and op in ("Add", "Sub", "Mul", "Div", "BitwiseOr", "BitwiseXor"):
            return binary(op, first, given[1], onnx_type(node.outputs[0]) in INTEGERS)
        return None

    def _clipped(self, node: gs.Node, first: Range | None) -> Range | None:
        ends = [self.graph.scalar(node.inputs[place]) if len(node.inputs) > place and not node.inputs[place].is_empty() else None
                for place in (1, 2)]  # fmt: skip
        low, high = (end if end is not None else first[place] if first else None for place, end in enumerate(ends))
        if low is None or high is None:
            return None
        if first is not None:
            low, high = min(max(low, first[0]), high), max(min(high, first[1]), low)
        return low, high

    @staticmethod
    def _whole(node: gs.Node, first: Range) -> Range | None:
        if node.op == "Cast":
            if onnx_type(node.outputs[0]) in INTEGERS:  # towards zero
                return int(first[0]), int(first[1])
            return first
        rounded = {"Floor": np.floor, "Ceil": np.ceil, "Round": np.rint}[node.op]
        return float(rounded(first[0])), float(rounded(first[1]))


def _of_type(tensor: gs.Tensor) -> Range | None:
    kind = onnx_type(tensor)
    return (0, (1 << INTEGERS[kind]) - 1) if kind in UNSIGNED else None


def _masked(given: list[Range | None]) -> Range | None:
    """Of a and b, what is not negative bounds both."""
    tops = [high for low, high in filter(None, given) if low >= 0]
    return (0, min(tops)) if tops else None


def binary(op: str, first: Range, second: Range, whole: bool = True) -> Range | None:
    """Of a result that does not wrap."""
    if op == "Add":
        return first[0] + second[0], first[1] + second[1]
    if op == "Sub":
        return first[0] - second[1], first[1] - second[0]
    if op == "Mul":
        ends = [one * other for one in first for other in second]
        return min(ends), max(ends)
    if op == "Div":
        if second[0] <= 0 <= second[1]:
            return None
        ends = [_quotient(one, other) if whole else one / other for one in first for other in second]
        return min(ends), max(ends)
    if min(first[0], second[0]) < 0:
        return None
    return 0, (1 << max(int(first[1]), int(second[1])).bit_length()) - 1


def _quotient(one: int, other: int) -> int:
    """Towards zero."""
    return abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)

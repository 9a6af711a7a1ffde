"""Bitwise operators on integers become arithmetic, which TensorRT has; it has no bitwise operator.

    BitwiseAnd(x, 2^k − 1)                                   →  Mod(x, 2^k)
    BitwiseXor(a, b, …)  mod 2^k, or a, b, … in [0, 2^k)     →  ReduceSum(Mod(a // p + b // p + …, 2) · p)    p = 1, 2, 4 … 2^(k-1)
    BitwiseOr, BitwiseAnd, of the same                       →  … (a // p mod 2 + b // p mod 2 + n - 1) // n …, … (…) // n …
    BitwiseNot(x)                                            →  −1 − x

Mod is that of the divisor's sign, so that the first holds for negative numbers, too: the k lowest bits of x in two's complement. For
the others that is asked of what reads them, BitwiseAnd(…, 2^k − 1) or Mod(…, 2^k), or proven of their operands (suture.surgery.ranges).
A chain of one operator is computed at once. Nothing overflows: each product is a power of two below 2^k.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, need, onnx_type, op_of, producer, rank
from suture.surgery.ranges import Ranges

BITS = {TensorProto.INT32: 30, TensorProto.INT64: 62}  # that a power of two in the type can have
EACH_BIT = ("BitwiseXor", "BitwiseOr", "BitwiseAnd")


def run(graph: Graph) -> int:
    ranges = Ranges(graph)
    masks = [node for node in graph.nodes("BitwiseAnd", "Mod") if _mask(graph, node) is not None]
    matches = graph.match(lambda graph, node: _low_bits(graph, node, ranges), masks)
    left = [node for node in graph.nodes(*EACH_BIT) if _read(graph, node) and not _inside(graph, node)]
    matches += graph.match(lambda graph, node: _bounded(graph, node, ranges), left)
    return matches + graph.match(_complement, graph.nodes("BitwiseNot"))


def _mask(graph: Graph, node: gs.Node) -> tuple[gs.Tensor, int] | None:
    """x and k, where the node is x's k lowest bits."""
    if onnx_type(node.outputs[0]) not in BITS:
        return None
    if node.op == "Mod":
        value = graph.scalar(node.inputs[1])
        plain = isinstance(value, int) and _power(value) and not node.attrs.get("fmod", 0)  # else its sign is the dividend's
        return (node.inputs[0], value.bit_length() - 1) if plain else None
    for x, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        value = graph.scalar(other)
        if isinstance(value, int) and _power(value + 1):
            return x, value.bit_length()
    return None


def _power(value: int) -> bool:
    """Whether it is 2^k, k ≥ 1."""
    return value >= 2 and value & (value - 1) == 0


def _low_bits(graph: Graph, node: gs.Node, ranges: Ranges) -> bool:
    x, bits = _mask(graph, node)
    need(bits <= BITS[onnx_type(x)], f"its {bits} bits are more than a power of two in the type has")
    inner = producer(x, *EACH_BIT)
    if inner is None or _mask(graph, inner) is not None:
        if node.op == "Mod":
            return False
        low = ranges.of(x)
        if low is not None and low[0] >= 0 and low[1] < 1 << bits:
            graph.redirect(node.outputs[0], x)
        else:
            graph.replace(node.outputs[0], "Mod", [x, _power_of(x, bits)], {"fmod": 0}, name=node.name)
        return True
    _write(graph, node, inner, bits, ranges)
    return True


def _read(graph: Graph, node: gs.Node) -> bool:
    """Whether anything still reads it: not what has been replaced, nor what only that reads."""
    if not node.outputs or graph.is_output(node.outputs[0]):
        return bool(node.outputs)
    return any(_read(graph, each) if each.op in EACH_BIT else each.outputs for each in node.outputs[0].outputs)


def _inside(graph: Graph, node: gs.Node) -> bool:
    """Whether only a chain of the same operator reads it, which is taken from its end."""
    readers = node.outputs[0].outputs
    return (
        bool(readers)
        and not graph.is_output(node.outputs[0])
        and all(op_of(each) == node.op and _mask(graph, each) is None for each in readers)
    )


def _bounded(graph: Graph, node: gs.Node, ranges: Ranges) -> bool:
    kind = onnx_type(node.outputs[0])
    need(kind in BITS, "it is neither int32 nor int64")
    found = [ranges.of(leaf) for leaf in _leaves(graph, node, node.op)]
    need(all(each is not None and each[0] >= 0 for each in found), "an operand is not known to be bounded and not negative")
    bits = max(1, max(int(high) for _, high in found).bit_length())
    need(bits <= BITS[kind], f"its operands have up to {bits} bits")
    _write(graph, node, node, bits, ranges)
    return True


def _leaves(graph: Graph, node: gs.Node, op: str) -> list[gs.Tensor]:
    found = []
    for tensor in node.inputs:
        inner = producer(tensor, op)
        found += _leaves(graph, inner, op) if inner is not None and _mask(graph, inner) is None else [tensor]
    return found


def _write(graph: Graph, end: gs.Node, node: gs.Node, bits: int, ranges: Ranges) -> None:
    """`end`'s output is the `bits` lowest bits of `node`'s."""
    leaves, powers = _leaves(graph, node, node.op), [1 << bit for bit in range(bits)]
    result = end.outputs[0]
    kind, dims = onnx_type(result), rank(result)
    need(dims is not None, "the rank of its operands is not known")
    dtype = np.int32 if kind == TensorProto.INT32 else np.int64
    p = gs.Constant(graph.unique("powers"), np.array(powers, dtype))
    two, total = gs.Constant(graph.unique("two"), np.array(2, dtype)), None
    for leaf in leaves:
        low = ranges.of(leaf)
        if low is None or low[0] < 0 or low[1] >= 1 << BITS[kind]:  # of a negative number // rounds away from what its bits are
            leaf = graph.new("Mod", [leaf, _power_of(leaf, bits)], {"fmod": 0}, dtype=kind)
            low = 0, (1 << bits) - 1
        bit = graph.new("Div", [graph.new("Unsqueeze", [leaf, graph.int64([-1])], dtype=kind), p], dtype=kind)
        if node.op != "BitwiseXor" or len(leaves) * low[1] >= 1 << BITS[kind]:
            bit = graph.new("Mod", [bit, two], {"fmod": 0}, dtype=kind)
        total = bit if total is None else graph.new("Add", [total, bit], dtype=kind)
    if node.op == "BitwiseXor":
        total = graph.new("Mod", [total, two], {"fmod": 0}, dtype=kind)
    else:
        if node.op == "BitwiseOr":
            total = graph.new("Add", [total, gs.Constant(graph.unique("others"), np.array(len(leaves) - 1, dtype))], dtype=kind)
        total = graph.new("Div", [total, gs.Constant(graph.unique("count"), np.array(len(leaves), dtype))], dtype=kind)
    parts = graph.new("Mul", [total, p], dtype=kind)
    graph.replace(result, "ReduceSum", [parts, graph.int64([-1])], {"keepdims": 0}, name=end.name)


def _power_of(x: gs.Tensor, bits: int) -> gs.Constant:
    return gs.Constant(
        f"{x.name}_low_{bits}_bits", np.array(1 << bits, np.int32 if onnx_type(x) == TensorProto.INT32 else np.int64)
    )


def _complement(graph: Graph, node: gs.Node) -> bool:
    x = node.inputs[0]
    need(onnx_type(x) in BITS, "it is neither int32 nor int64")
    dtype = np.int32 if onnx_type(x) == TensorProto.INT32 else np.int64
    graph.replace(node.outputs[0], "Sub", [gs.Constant(graph.unique("minus_one"), np.array(-1, dtype)), x], name=node.name)
    return True

"""Integers of type uint32 and uint16, which TensorRT has not, become int64 of the same values.

    Cast(x, uint32)               →  Mod(Cast(x, int64), 2^32)
    Add, Sub, Mul in uint32       →  Mod(…, 2^32)                        each Mod left out where nothing can pass 2^32
    Mul(x, c)  that passes int64  →  Mod(x · c0 + Mod(x · c1, 2^16) · 2^16, 2^32)      c = c1 · 2^16 + c0
    BitShift(x, s)                →  Mod(x · 2^s, 2^32), or x // 2^s

Only where all that such tensors are read by and computed by is known, and none is an input or output of the graph.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, need, onnx_type, op_of
from suture.surgery.ranges import Range, Ranges, binary

LIMIT = 1 << 63
BITS = {TensorProto.UINT32: 32, TensorProto.UINT16: 16}
ARITHMETIC = ("Add", "Sub", "Mul")
CLOSED = ("Div", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Min", "Max", "Where", "Concat", "Unsqueeze", "Squeeze", "Reshape",
          "Transpose", "Expand", "Slice", "Gather", "Identity", "Flatten", "Tile")  # fmt: skip
COMPUTED = ("BitShift", *ARITHMETIC, "Div", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Min", "Max")
READERS = ("Cast", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")


def run(graph: Graph) -> int:
    nodes = [node for node in graph.gs.nodes if any(onnx_type(each) in BITS for each in (*node.inputs, *node.outputs))]
    if not any(node.op in COMPUTED for node in nodes):  # what is quantised to such numbers is no arithmetic
        return 0
    ranges, before = Ranges(graph), len(graph.near_misses)
    facts = {id(node): [ranges.of(each) for each in node.inputs if not each.is_empty()] for node in nodes}
    matches = graph.match(lambda graph, node: _known(graph, node, facts[id(node)]), nodes)
    if len(graph.near_misses) > before:
        return 0
    kinds = {id(node): onnx_type(node.outputs[0]) for node in nodes}
    for tensor in {id(each): each for node in nodes for each in (*node.inputs, *node.outputs)}.values():
        if onnx_type(tensor) in BITS:
            _retype(graph, tensor)
    for node in nodes:
        if kinds[id(node)] in BITS:
            _write(graph, node, BITS[kinds[id(node)]], facts[id(node)])
    return matches


def _known(graph: Graph, node: gs.Node, given: list[Range | None]) -> bool:
    ends = [each for each in (*graph.gs.inputs, *graph.gs.outputs) if onnx_type(each) in BITS]
    need(not ends, f"{ends and ends[0].name}, which the graph takes or gives, is unsigned")
    own = onnx_type(node.outputs[0]) in BITS
    need(
        op_of(node) in (("Cast", "BitShift", *ARITHMETIC, *CLOSED) if own else READERS), "no pass knows it of unsigned integers"
    )
    factor = graph.scalar(node.inputs[1]) if node.op in ("BitShift", "Mul") else None
    need(
        node.op != "BitShift" or (factor is not None and factor < BITS[onnx_type(node.outputs[0])]),
        "how far it shifts is not known",
    )
    fits = node.op != "Mul" or binary("Mul", *given)[1] < LIMIT or factor is not None
    need(fits, "a product of two unknown numbers may be larger than int64 is")
    return True


def _retype(graph: Graph, tensor: gs.Tensor) -> None:
    if isinstance(tensor, gs.Constant):
        tensor.values = np.asarray(tensor.values).astype(np.int64)
    else:
        tensor.dtype = np.int64


def _write(graph: Graph, node: gs.Node, bits: int, given: list[Range | None]) -> None:
    result, limit = node.outputs[0], 1 << bits
    if node.op == "Cast":
        whole = graph.new("Cast", [node.inputs[0]], {"to": TensorProto.INT64}, dtype=TensorProto.INT64)
        fits = given[0] is not None and given[0][0] >= 0 and given[0][1] < limit
    elif node.op == "BitShift":
        power = _number(graph, 1 << graph.scalar(node.inputs[1]))
        left = node.attrs["direction"] == "LEFT"
        whole = graph.new("Mul" if left else "Div", [node.inputs[0], power], dtype=TensorProto.INT64)
        fits = not left
    elif node.op in ARITHMETIC:
        found = binary(node.op, *given)
        whole = _split(graph, node) if found[1] >= LIMIT else graph.new(node.op, list(node.inputs), dtype=TensorProto.INT64)
        fits = found[0] >= 0 and found[1] < limit
    else:
        return
    if fits:
        graph.replace(result, "Identity", [whole], name=node.name)
    else:
        graph.replace(result, "Mod", [whole, _number(graph, limit)], {"fmod": 0}, name=node.name)


def _split(graph: Graph, node: gs.Node) -> gs.Tensor:
    """x · c in two products, neither of which passes int64."""
    factor, half = graph.scalar(node.inputs[1]), 1 << 16
    low, high = (
        graph.new("Mul", [node.inputs[0], _number(graph, part)], dtype=TensorProto.INT64)
        for part in (factor % half, factor // half)
    )
    high = graph.new("Mod", [high, _number(graph, half)], {"fmod": 0}, dtype=TensorProto.INT64)
    high = graph.new("Mul", [high, _number(graph, half)], dtype=TensorProto.INT64)
    return graph.new("Add", [low, high], dtype=TensorProto.INT64)


def _number(graph: Graph, value: int) -> gs.Constant:
    return graph.int64(value, "number")

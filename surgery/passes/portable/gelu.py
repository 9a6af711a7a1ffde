"""GELU, written out, becomes one Gelu.

    0.5 * x * (1 + erf(x / sqrt(2)))                                    exactly
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))           approximate="tanh"

However the products are arranged: what stands inside the function, and what multiplies 1 + function, are read as
polynomials of x and compared with these. Where x is half precision that was widened for this alone, and the result is
narrowed again, Gelu takes and gives half precision.
"""

import math

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, onnx_type, other_input, producer

INSIDE = {
    "Erf": {1: 1 / math.sqrt(2)},
    "Tanh": {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715},
}
OUTSIDE = {1: 0.5}
RELATIVE = 1e-3  # exporters round the constants, to half precision at worst
Polynomial = dict[int, float]  # power of x -> coefficient


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("Erf", "Tanh"))


def _fuse(graph: Graph, function: gs.Node) -> bool:
    candidates = _candidates(graph, function.inputs[0])
    x = next((x for x in candidates if _inside(graph, function, x)), None)
    if x is None:
        cubic = [found for x in candidates if (found := _polynomial(graph, function.inputs[0], x)) and set(found) == {1, 3}]
        need(not cubic and function.op == "Tanh", f"the {function.op.lower()} is not of what GELU takes it of {cubic or ''}")
        return False  # some other tanh: a soft cap, a plain activation
    add = only_consumer(function.outputs[0], "Add")
    need(add is not None, "the function is not used by one Add alone")
    need(graph.scalar(other_input(add, function.outputs[0])) == 1, "what is added to the function is not 1")
    outside, result = {0: 1.0}, add.outputs[0]
    while not _close(outside, OUTSIDE):
        product = only_consumer(result, "Mul", "Div")
        need(product is not None, f"1 + {function.op.lower()} is multiplied by {outside}, not by 0.5 * x")
        need(product.op == "Mul" or product.inputs[0] is result, "1 + function is divided by, not divided")
        factor = _polynomial(graph, other_input(product, result), x)
        need(factor is not None, f"1 + {function.op.lower()} is multiplied by something that is not made of x")
        outside, result = _combined(product.op, outside, factor), product.outputs[0]
        need(outside is not None, "1 + function is divided by x")
    widened, narrowed = producer(x, "Cast"), only_consumer(result, "Cast")
    if widened is not None and narrowed is not None and onnx_type(widened.inputs[0]) == onnx_type(narrowed.outputs[0]):
        x, result = widened.inputs[0], narrowed.outputs[0]
    graph.replace(result, "Gelu", [x], {"approximate": "none" if function.op == "Erf" else "tanh"})
    return True


def _candidates(graph: Graph, tensor: gs.Tensor) -> list[gs.Tensor]:
    """Tensors above the function's argument that may be x, nearest first."""
    found, level = [], [tensor]
    for _ in range(5):
        level = [
            above
            for tensor in level
            if (node := producer(tensor, "Add", "Mul", "Div", "Pow")) is not None
            for above in node.inputs
            if isinstance(above, gs.Variable)
        ]
        found += level
    return list({id(tensor): tensor for tensor in found}.values())


def _inside(graph: Graph, function: gs.Node, x: gs.Tensor) -> bool:
    return _close(_polynomial(graph, function.inputs[0], x), INSIDE[function.op])


def _polynomial(graph: Graph, tensor: gs.Tensor, x: gs.Tensor, depth: int = 8) -> Polynomial | None:
    """`tensor` as a polynomial of x, with constants as coefficients; None if it is none."""
    if tensor is x:
        return {1: 1.0}
    if (number := graph.scalar(tensor)) is not None:
        return {0: float(number)}
    node = producer(tensor, "Add", "Mul", "Div", "Pow")
    if node is None or depth == 0:
        return None
    first, second = (_polynomial(graph, operand, x, depth - 1) for operand in node.inputs)
    return _combined(node.op, first, second) if first is not None and second is not None else None


def _combined(op: str, first: Polynomial, second: Polynomial) -> Polynomial | None:
    if op == "Add":
        return {power: first.get(power, 0) + second.get(power, 0) for power in first | second}
    if op == "Mul":
        powers = {a + b for a in first for b in second}
        return {p: sum(first[a] * second[p - a] for a in first if p - a in second) for p in powers}
    if list(second) != [0] or not second[0]:
        return None
    if op == "Div":
        return {power: number / second[0] for power, number in first.items()}
    if second[0] not in (1, 2, 3):
        return None
    result = first
    for _ in range(int(second[0]) - 1):
        result = _combined("Mul", result, first)
    return result


def _close(polynomial: Polynomial | None, expected: Polynomial) -> bool:
    return (
        polynomial is not None
        and polynomial.keys() == expected.keys()
        and all(np.isclose(polynomial[power], number, rtol=RELATIVE, atol=0) for power, number in expected.items())
    )

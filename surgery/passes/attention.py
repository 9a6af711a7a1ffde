"""Attention, written out, becomes one Attention with native heads.

    softmax(scale * query @ key^T + mask) @ value          [B, heads, S, D] and [B, kv_heads, T, D]

Matches the scale on the scores, or on query and key each; masks by Where or Add, before or after the scale; key^T as a
Transpose of any layout, or through three dimensions; a float32 softmax between half-precision products; guards against
NaN. A mask that Where applies stays boolean, one that Add applies stays a bias: what it means is for later passes.
"""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import (
    Graph,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    other_input,
    producer,
    rank,
    through,
)

MASKED = -1e4  # what exporters put where a score must not count is at most this


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("Softmax"))


@dataclass
class Scores:
    """What lies between query @ key^T and the softmax."""

    product: gs.Node
    scale: float = 1.0
    mask: gs.Tensor | None = None


def _fuse(graph: Graph, softmax: gs.Node) -> bool:
    context = _context(graph, softmax)
    if context is None:
        return False
    need(last_axis(softmax.attrs.get("axis", -1), softmax.inputs[0]), "the softmax is not over the last axis")
    scores = _scores(graph, softmax.inputs[0])
    if scores is None:
        return False
    query, query_scale = _unscaled(graph, scores.product.inputs[0])
    key_T, key_scale = _unscaled(graph, scores.product.inputs[1])
    key = _untransposed(graph, key_T)
    need(key is not None, "the second operand of query @ key^T is not a transposed key")
    key, inner_scale = _unscaled(graph, key)
    value = context.inputs[1]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        need(rank(tensor) == 4, f"the {name} has rank {rank(tensor)}, not [batch, heads, sequence, head_dim]")
    need(onnx_type(query) == onnx_type(key) == onnx_type(value), "query, key and value differ in type")
    mask = scores.mask
    if mask is not None and onnx_type(mask) not in (onnx_type(query), 9):  # 9: bool
        mask = graph.new("Cast", [mask], {"to": onnx_type(query)}, dtype=onnx_type(query), shape=mask.shape)
    scale = float(scores.scale * query_scale * key_scale * inner_scale)
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    graph.replace(context.outputs[0], "Attention", inputs, {"scale": scale})
    return True


def _context(graph: Graph, softmax: gs.Node) -> gs.Node | None:
    """The product weights @ value that the softmax feeds, past casts and NaN guards."""
    weights = softmax.outputs[0]
    while True:
        users = {id(node): node for node in weights.outputs}.values()
        guard = next((node for node in users if node.op == "IsNaN"), None)
        if guard is not None:
            where = only_consumer(guard.outputs[0], "Where")
            if where is None or where.inputs[2] is not weights:
                return None
            weights = where.outputs[0]
        elif (cast := only_consumer(weights, "Cast", "Identity")) is not None:
            weights = cast.outputs[0]
        else:
            product = only_consumer(weights, "MatMul")
            return product if product is not None and product.inputs[0] is weights else None


def _scores(graph: Graph, tensor: gs.Tensor) -> Scores | None:
    """Walks up from the softmax to the product of query and key; None where there is no such product."""
    scale, mask = 1.0, None
    while (node := producer(tensor)) is not None:
        if node.op == "MatMul":
            return Scores(node, scale, mask)
        if node.op in ("Cast", "Identity"):
            tensor = node.inputs[0]
        elif node.op in ("Mul", "Div") and (factor := _factor(graph, node)) is not None:
            tensor, number = factor
            scale *= number
        elif node.op == "Max" and len(node.inputs) == 2 and _least(graph, node.inputs[1]):
            tensor = node.inputs[0]  # clamps the mask's -inf
        elif node.op == "Where" and _leads_to_product(graph, node.inputs[1]):
            need(_least(graph, node.inputs[2]), "masked scores are set to something that still counts")
            need(mask is None, "two masks apply")
            mask, tensor = node.inputs[0], node.inputs[1]
        elif node.op == "Where" and _leads_to_product(graph, node.inputs[2]):
            need(_least(graph, node.inputs[1]), "masked scores are set to something that still counts")
            need(mask is None, "two masks apply")
            mask, tensor = graph.new("Not", [node.inputs[0]], shape=node.inputs[0].shape), node.inputs[2]
        elif node.op == "Add":
            leads = [_leads_to_product(graph, operand) for operand in node.inputs]
            if sum(leads) != 1:
                return None
            tensor = node.inputs[leads.index(True)]
            bias = other_input(node, tensor)
            mask = bias if mask is None else _both(graph, mask, bias)
            if scale != 1.0:
                mask = graph.new("Mul", [mask, graph.number(scale, onnx_type(mask))], shape=mask.shape)
        else:
            return None
    return None


def _factor(graph: Graph, node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """What a Mul or Div by a constant scales, and by how much."""
    first, second = node.inputs
    if node.op == "Div":
        number = graph.scalar(second)
        return None if number is None else (first, 1 / number)
    for tensor, constant in ((first, second), (second, first)):
        if (number := graph.scalar(constant)) is not None:
            return tensor, number
    return None


def _least(graph: Graph, tensor: gs.Tensor) -> bool:
    """Whether a score set to this constant no longer counts."""
    values = graph.constant(through(tensor, "Expand", "Cast"))
    return values is not None and bool(np.all(values.astype(np.float64) <= MASKED))


def _leads_to_product(graph: Graph, tensor: gs.Tensor) -> bool:
    """Whether a walk up through what may lie on the scores' way ends at a MatMul of two activations."""
    node = producer(tensor)
    while node is not None:
        if node.op == "MatMul":
            return not any(isinstance(operand, gs.Constant) for operand in node.inputs)
        if node.op in ("Mul", "Div") and (factor := _factor(graph, node)) is not None:
            node = producer(factor[0])
        elif node.op in ("Cast", "Identity", "Max"):
            node = producer(node.inputs[0])
        elif node.op in ("Add", "Where"):
            return any(_leads_to_product(graph, operand) for operand in node.inputs)
        else:
            return False
    return False


def _both(graph: Graph, first: gs.Tensor, second: gs.Tensor) -> gs.Tensor:
    need(onnx_type(first) == onnx_type(second) and onnx_type(first) != 9, "a boolean mask and a bias both apply")
    return graph.new("Add", [first, second])


def _unscaled(graph: Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = producer(tensor, "Mul", "Div")
    factor = _factor(graph, node) if node is not None else None
    return factor if factor is not None else (tensor, 1.0)


def _untransposed(graph: Graph, key_T: gs.Tensor) -> gs.Tensor | None:
    """key [B, heads, T, D], from its transpose [B, heads, D, T]."""
    node = producer(key_T, "Transpose")
    if node is not None:
        perm = list(node.attrs["perm"])
        if len(perm) != 4:
            return None
        swapped = [perm[0], perm[1], perm[3], perm[2]]
        if swapped == [0, 1, 2, 3]:
            return node.inputs[0]
        return graph.new("Transpose", [node.inputs[0]], {"perm": swapped}, shape=_swapped(key_T))
    reshape = producer(key_T, "Reshape")  # [B, heads, T, D] → [B·heads, T, D] → [B·heads, D, T] → [B, heads, D, T]
    transpose = producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    flatten = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if flatten is None or list(transpose.attrs["perm"]) != [0, 2, 1] or rank(flatten.outputs[0]) != 3:
        return None
    key = flatten.inputs[0]
    return key if rank(key) == 4 and key.shape[2:] == list(flatten.outputs[0].shape[1:]) else None


def _swapped(key_T: gs.Tensor) -> list | None:
    return None if key_T.shape is None else [*key_T.shape[:2], key_T.shape[3], key_T.shape[2]]

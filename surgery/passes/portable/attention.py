"""Attention, written out, becomes one Attention with native heads.

    softmax(scale * query @ key^T + mask) @ value          [B, heads, S, D] and [B, kv_heads, T, D]

Matches the scale on the scores, or on query and key each; masks by Where or Add, before or after the scale; key^T as a
Transpose of any layout; products over three dimensions, batch and heads merged or not told apart; learned queries; a
float32 softmax between half-precision products, or before a value cast to float32; guards against NaN; scores that are
capped, cap * tanh(scale * query @ key^T / cap), before they are masked. A mask that Where applies stays boolean, one that
Add applies stays a bias: what it means is for later passes.
"""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from suture.core.additive_mask import FAR_BELOW, HIDDEN
from suture.surgery.graph import (
    Graph,
    NoMatch,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    op_of,
    other_input,
    producer,
    rank,
    static_dim,
    through,
)
from suture.surgery.heads import heads_apart, heads_in_rows, of_batch, one_batch, same_matrices, sizes_of, split, unmerged
from suture.surgery.masks.mask_builders import both
from suture.surgery.rows import of_tokens

BOOL = 9


def run(graph: Graph) -> int:
    products = [node.inputs[0] for node in graph.nodes("MatMul") if not isinstance(node.inputs[1], gs.Constant)]
    steps = of_tokens(graph, products) if graph.nodes("Softmax") else set()
    return graph.match(lambda graph, node: _fuse(graph, node, steps), graph.nodes("Softmax"))


@dataclass
class Scores:
    """What lies between query @ key^T and the softmax."""

    product: gs.Node
    scale: float = 1.0
    mask: gs.Tensor | None = None
    least: float | None = None  # what hides rows of a constant mask that see nothing
    softcap: float = 0.0


def _fuse(graph: Graph, softmax: gs.Node, steps: set[int]) -> bool:
    found = _context(graph, softmax)
    if found is None:
        return False
    context, guarded = found
    need(last_axis(softmax.attrs.get("axis", -1), softmax.inputs[0]), "the softmax is not over the last axis")
    scores = scores_of(graph, softmax.inputs[0])
    if scores is None:
        return False
    need(scores.least is None or (guarded and scores.least == -np.inf), "its mask has rows that see nothing, and count")
    query, query_scale = _unscaled(graph, scores.product.inputs[0])
    key_T, key_scale = _unscaled(graph, scores.product.inputs[1])
    merged = rank(query) == 3
    key = untransposed(graph, unmerged(key_T))
    need(key is not None, "the second operand of query @ key^T is not a transposed key")
    of_three = query, key, context.inputs[1]
    key, inner_scale = _unscaled(graph, unmerged(key))
    query, value = unmerged(query), unmerged(context.inputs[1])
    if [rank(tensor) for tensor in of_three] == [3, 3, 3] and 3 in (rank(query), rank(key), rank(value)):
        inner_scale = 1.0
        query, key, value = one_batch(graph, of_three)
        need(
            scores.mask is None or rank(scores.mask) in (1, 2, 3),
            "what is added to the scores has heads that query, key and value do not show",
        )
    widened = producer(value, "Cast") if onnx_type(value) != onnx_type(query) else None
    if widened is not None and onnx_type(widened.inputs[0]) == onnx_type(query):
        value = widened.inputs[0]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        need(rank(tensor) == 4, f"the {name} has rank {rank(tensor)}, not [batch, heads, sequence, head_dim]")
    need(onnx_type(query) == onnx_type(key) == onnx_type(value), "query, key and value differ in type")
    mask, grouped = scores.mask, None
    if isinstance(query, gs.Constant) and query.shape[0] == 1 != key.shape[0]:
        query = of_batch(graph, query, key)
    heads = heads_in_rows(graph, query, key)
    if heads is not None:
        need(not merged, "query heads lie in the rows of a product of three dimensions")
        grouped, query = query, heads
        need(mask is None or static_dim(mask, -2) in (1, None), "heads of one group, in the query's rows, are masked apart")
        need(mask is None or rank(mask) < 3 or static_dim(mask, -3) == 1, "query heads in rows are masked apart")
    if mask is not None and onnx_type(mask) not in (onnx_type(query), BOOL):
        mask = graph.new("Cast", [mask], {"to": onnx_type(query)}, dtype=onnx_type(query), shape=mask.shape)
    if mask is not None:
        mask = _over_rows(graph, mask, query, id(scores.product.inputs[0]) in steps or heads is not None)
    scale = float(scores.scale * query_scale * key_scale * inner_scale)
    need(scale > 0, f"the scale is {scale}")
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    result = context.outputs[0]
    if grouped is not None:
        result = heads_apart(graph, result, grouped, [*query.shape[:3], value.shape[3]])
    _put(graph, result, inputs, {"scale": scale} | ({"softcap": scores.softcap} if scores.softcap else {}), merged)
    return True


def _put(graph: Graph, result: gs.Variable, inputs: list[gs.Tensor], attrs: dict, merged: bool) -> None:
    """Attention in place of `result`, in whose type, and over whose dimensions, what follows expects it."""
    query = inputs[0]
    if onnx_type(result) == onnx_type(query) and not merged:
        graph.replace(result, "Attention", inputs, attrs)
        return
    name = result.inputs[0].name
    tensor = graph.new("Attention", inputs, attrs, name=name, shape=[*query.shape[:3], inputs[2].shape[3]])
    if merged:
        target = sizes_of(graph, [-1], query, 2, [int(inputs[2].shape[3])])
        if onnx_type(result) == onnx_type(query):
            graph.replace(result, "Reshape", [tensor, target])
            return
        tensor = graph.new("Reshape", [tensor, target], shape=result.shape)
    graph.replace(result, "Cast", [tensor], {"to": onnx_type(result)})


def _over_rows(graph: Graph, mask: gs.Tensor, query: gs.Tensor, of_tokens: bool) -> gs.Tensor:
    """A mask that is the same for all rows of the query, once for each: onnxruntime broadcasts it over batch and heads alone,
    and TensorRT takes none of three dimensions. Rows that are not the step's tokens may have one in common, whatever the
    mask's are called."""
    need(rank(mask) in (1, 2, 3, 4), f"what is added to the scores has rank {rank(mask)}")
    need(static_dim(mask, -1) != 1, "what is added to the scores is the same for all slots, which Attention does not take")
    if rank(mask) in (1, 3):
        mask = graph.new("Unsqueeze", [mask, graph.int64([0])], shape=[1, *mask.shape])
    known = static_dim(mask, -2), static_dim(query, 2)
    if known[0] == known[1] is not None or (known[0] != 1 and (of_tokens or known[1] is None)):
        return mask
    steps = graph.new("Shape", [query], {"start": 2, "end": 3}, dtype=np.int64, shape=[1])
    parts = [graph.int64([1] * (rank(mask) - 2)), steps, graph.int64([1])][rank(mask) == 2 :]
    target = graph.new("Concat", parts, {"axis": 0}, dtype=np.int64, shape=[rank(mask)])
    return graph.new("Expand", [mask, target], shape=[*mask.shape[:-2], query.shape[2], mask.shape[-1]])


def _context(graph: Graph, softmax: gs.Node) -> tuple[gs.Node, bool] | None:
    """The product weights @ value that the softmax feeds, past casts and NaN guards, and whether there are such guards."""
    weights, guarded = softmax.outputs[0], False
    while True:
        users = {id(node): node for node in weights.outputs}.values()
        guard = next((node for node in users if op_of(node) == "IsNaN"), None)
        if guard is not None:
            where = only_consumer(guard.outputs[0], "Where")
            if where is None or where.inputs[2] is not weights:
                return None
            weights, guarded = where.outputs[0], True
        elif (cast := only_consumer(weights, "Cast", "Identity")) is not None:
            weights = cast.outputs[0]
        elif (reshape := only_consumer(weights, "Reshape")) is not None and same_matrices(weights, reshape.outputs[0]):
            weights = reshape.outputs[0]
        else:
            product = only_consumer(weights, "MatMul")
            return (product, guarded) if product is not None and product.inputs[0] is weights else None


def scores_of(graph: Graph, tensor: gs.Tensor) -> Scores | None:
    """Walks up from the softmax to the product of query and key; None where there is no such product."""
    scale, mask, heads, least, softcap = 1.0, None, None, None, 0.0
    while (node := producer(tensor)) is not None:
        op = op_of(node)
        if op == "MatMul":
            return Scores(node, scale * softcap if softcap else scale, mask, least, softcap)
        if op in ("Cast", "Identity"):
            tensor = node.inputs[0]
        elif op in ("Mul", "Div") and (factor := _factor(graph, node)) is not None:
            tensor, number = factor
            scale *= number
        elif op == "Tanh":
            need(not softcap and scale > 0, "the scores are capped in a way that Attention has no attribute for")
            tensor, softcap, scale = node.inputs[0], scale, 1.0
        elif softcap and op in ("Max", "Where", "Add"):
            raise NoMatch("the scores are masked before they are capped")
        elif op == "Reshape" and rank(node.inputs[0]) == 3 and same_matrices(node.inputs[0], tensor):
            heads, tensor = tensor, node.inputs[0]
        elif op == "Reshape" and [rank(node.inputs[0]), rank(tensor)] == [4, 3] and same_matrices(node.inputs[0], tensor):
            need(mask is None, "what is added to the scores has batch and heads in one axis")
            tensor = node.inputs[0]
        elif op == "Max" and len(node.inputs) == 2 and _least(graph, node.inputs[1]):
            tensor = node.inputs[0]  # clamps the mask's -inf
        elif op == "Where" and _leads_to_product(graph, node.inputs[1]):
            need(_least(graph, node.inputs[2]), "masked scores are set to something that still counts")
            least = least if _all_see(graph, node.inputs[0]) else _value(graph, node.inputs[2])
            mask, tensor = both(graph, node.inputs[0], mask), node.inputs[1]
        elif op == "Where" and _leads_to_product(graph, node.inputs[2]):
            need(_least(graph, node.inputs[1]), "masked scores are set to something that still counts")
            least = least if _all_see(graph, node.inputs[0], hidden=True) else _value(graph, node.inputs[1])
            seen = graph.new("Not", [node.inputs[0]], shape=node.inputs[0].shape)
            mask, tensor = both(graph, seen, mask), node.inputs[2]
        elif op == "Add":
            leads = [_leads_to_product(graph, operand) for operand in node.inputs]
            if not any(leads):
                leads = [_leads_to_product(graph, operand, learned=True) for operand in node.inputs]
            if sum(leads) != 1:
                return None
            tensor = node.inputs[leads.index(True)]
            bias = _with_heads(graph, other_input(node, tensor), heads)
            least = least if _all_see(graph, bias) else _value(graph, bias)
            if scale != 1.0:
                bias = graph.new("Mul", [bias, graph.number(scale, onnx_type(bias))], shape=bias.shape)
            mask = both(graph, bias, mask)
        else:
            return None
    return None


def _with_heads(graph: Graph, bias: gs.Tensor, heads: gs.Tensor | None) -> gs.Tensor:
    """What is added to scores of three dimensions, over the four of `heads` [B, heads, S, T]."""
    if heads is None or rank(bias) in (0, 1, 2):
        return bias
    need(rank(bias) == 3 and isinstance(heads.shape[1], int), "a bias is added whose heads are not known")
    need(bias.shape[0] not in (None, 1), "a bias is added to the scores of all heads and rows at once")
    return split(graph, bias, heads)


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


def _all_see(graph: Graph, mask: gs.Tensor, hidden: bool = False) -> bool:
    """Whether each row of a mask, true where something is seen or (`hidden`) not, or added, sees something; of a mask that is
    not constant nobody knows. Of scores to which a number is added that leaves the sum in range, the rows stay different."""
    values = graph.constant(mask)
    if values is None or values.ndim == 0:
        return True
    seen = values != hidden if values.dtype == bool else values.astype(np.float64) > HIDDEN[onnx_type(mask)]
    return bool(seen.any(axis=-1).all())


def _value(graph: Graph, tensor: gs.Tensor) -> float:
    """The least number of a constant."""
    return float(graph.constant(through(tensor, "Expand", "Cast")).astype(np.float64).min())


def _least(graph: Graph, tensor: gs.Tensor) -> bool:
    """Whether a score set to this constant no longer counts."""
    values = graph.constant(through(tensor, "Expand", "Cast"))
    return values is not None and bool(np.all(values.astype(np.float64) <= FAR_BELOW))


def _leads_to_product(graph: Graph, tensor: gs.Tensor, learned: bool = False) -> bool:
    """Whether a walk up through what may lie on the scores' way ends at a MatMul of two activations, or, of `learned` queries, at
    one whose second operand is."""
    node = producer(tensor)
    while node is not None:
        op = op_of(node)
        if op == "MatMul":
            return not any(isinstance(operand, gs.Constant) for operand in node.inputs[int(learned) :])
        if op in ("Mul", "Div") and (factor := _factor(graph, node)) is not None:
            node = producer(factor[0])
        elif op in ("Cast", "Identity", "Max", "Reshape", "Tanh"):
            node = producer(node.inputs[0])
        elif op in ("Add", "Where"):
            return any(_leads_to_product(graph, operand, learned) for operand in node.inputs)
        else:
            return False
    return False


def _unscaled(graph: Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = producer(tensor, "Mul", "Div")
    factor = _factor(graph, node) if node is not None else None
    return factor if factor is not None else (tensor, 1.0)


def untransposed(graph: Graph, key_T: gs.Tensor) -> gs.Tensor | None:
    """key [B, heads, T, D], from its transpose [B, heads, D, T]."""
    node = producer(key_T, "Transpose")
    if node is not None:
        perm = list(node.attrs.get("perm", []))
        if len(perm) not in (3, 4):
            return None
        swapped = [*perm[:-2], perm[-1], perm[-2]]
        if swapped == sorted(perm):
            return node.inputs[0]
        return graph.new("Transpose", [node.inputs[0]], {"perm": swapped}, shape=_swapped(key_T))
    if (joined := producer(key_T, "Concat")) is not None:
        return _joined_before(graph, key_T, joined)
    reshape = producer(key_T, "Reshape")  # [B, heads, T, D] → [B·heads, T, D] → [B·heads, D, T] → [B, heads, D, T]
    if reshape is None or not same_matrices(reshape.inputs[0], key_T):
        return None
    transpose = producer(reshape.inputs[0], "Transpose")
    if transpose is None or list(transpose.attrs.get("perm", [])) != [0, 2, 1]:
        return None
    key = unmerged(transpose.inputs[0])
    if rank(key) == 4:
        return key
    return split(graph, key, key_T) if isinstance(key_T.shape[1], int) else None


def _joined_before(graph: Graph, key_T: gs.Tensor, joined: gs.Node) -> gs.Tensor | None:
    """concat(a, b) over slots, of concat(a^T, b^T): what old GPT-2s keep their keys as. What transposes it back reads that."""
    if rank(key_T) != 4 or not last_axis(joined.attrs["axis"], key_T):
        return None
    parts = [untransposed(graph, part) for part in joined.inputs]
    if any(part is None for part in parts):
        return None
    back = [node.outputs[0] for node in key_T.outputs if op_of(node) == "Transpose" and node.attrs.get("perm") == [0, 1, 3, 2]]
    key = next((tensor for tensor in back if graph.is_output(tensor)), None)  # a cache is to be joined by one Concat
    if key is None:
        key = graph.new("Concat", parts, {"axis": 2}, name=joined.name, dtype=onnx_type(key_T), shape=_swapped(key_T))
    else:
        graph.replace(key, "Concat", parts, {"axis": 2}, name=joined.name)
    for tensor in back:
        if tensor is not key:
            graph.redirect(tensor, key)
    return key


def _swapped(key_T: gs.Tensor) -> list | None:
    return None if key_T.shape is None else [*key_T.shape[:-2], key_T.shape[-1], key_T.shape[-2]]

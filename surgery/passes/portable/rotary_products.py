"""Rotary embedding whose halves are written out one by one, over tables that hold each angle once, becomes RotaryEmbedding.

    concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)        with x = concat(x1, x2) on the last axis

x: [B, heads, S, D]; cos, sin: [B, 1, S, D/2]. gpt-oss has it so; rotary_embedding has the forms with doubled tables.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, last_axis, need, onnx_type, operands, producer, rank, static_dim
from suture.surgery.passes.portable.rotary_embedding import expanded, halved, without_axis


def run(graph: Graph) -> int:
    tables: dict[int, gs.Tensor] = {}
    return graph.match(lambda graph, concat: _fuse(graph, concat, tables), graph.nodes("Concat"))


def _fuse(graph: Graph, concat: gs.Node, tables: dict[int, gs.Tensor]) -> bool:
    if len(concat.inputs) != 2:
        return False
    first, second = (producer(tensor, op) for tensor, op in zip(concat.inputs, ("Sub", "Add")))
    if first is None or second is None:
        return False
    found = _turned(graph, first, second)
    if found is None:
        return False
    x, cos, sin = found
    need(last_axis(concat.attrs["axis"], x), "the halves do not lie on the last axis")
    size = static_dim(x, -1)
    need(rank(x) == 4 and size, f"x has rank {rank(x)}, not [batch, heads, sequence, head_dim]")
    for table in (cos, sin):
        fits = rank(table) == 4 and static_dim(table, 1) == 1 and static_dim(table, 3) == size // 2
        need(fits and onnx_type(table) == onnx_type(x), "cos or sin is not [batch, 1, sequence, head_dim / 2] in x's type")
    for table in (cos, sin):
        if id(table) not in tables:
            once = without_axis(graph, table, 1, 4)
            tables[id(table)] = expanded(graph, once, x) if static_dim(table, 0) == 1 else once
    graph.replace(concat.outputs[0], "RotaryEmbedding", [x, tables[id(cos)], tables[id(sin)]], {"interleaved": 0})
    return True


def _turned(graph: Graph, first: gs.Node, second: gs.Node) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor] | None:
    """x, cos and sin of first = x1 * cos - x2 * sin and second = x2 * cos + x1 * sin."""
    products = [producer(tensor, "Mul") for tensor in (*first.inputs, *second.inputs)]
    if any(product is None for product in products):
        return None
    added = [{id(tensor) for tensor in product.inputs} for product in products[2:]]
    for x1, cos in operands(products[0]):
        for x2, sin in operands(products[1]):
            x = halved(graph, x1, x2)
            wanted = {id(x2), id(cos)}, {id(x1), id(sin)}
            if x is not None and added in ([*wanted], [*wanted[::-1]]):
                return x, cos, sin
    return None

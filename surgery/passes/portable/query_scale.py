"""A factor that scales every head of a rotated query alike moves into the query's own rotary tables.

    RotaryEmbedding(x, cos, sin) * s   →   RotaryEmbedding(x, cos * s, sin * s)        s: a number, or [B, 1, S, 1]

Rotation is linear, so log-n scaling, and attention's 1 / sqrt(D) where attention has no scale of its own, cost nothing
a layer; and in half precision the product is rounded once, in the table, instead of once more in the query.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, is_half, only_consumer, onnx_type, operands, producer, rank, static_dim


def run(graph: Graph) -> int:
    tables: dict[tuple, gs.Tensor] = {}
    return graph.match(lambda graph, node: _fold(graph, node, tables), graph.nodes("RotaryEmbedding"))


def _fold(graph: Graph, rotary: gs.Node, tables: dict[tuple, gs.Tensor]) -> bool:
    rotated = rotary.outputs[0]
    product = only_consumer(rotated, "Mul")
    if product is None or graph.is_output(rotated) or len(rotary.inputs) != 3 or rotary.attrs.get("rotary_embedding_dim", 0):
        return False
    scale = next(right for left, right in operands(product) if left is rotated)
    if graph.scalar(wide(scale)) is None and not _one_factor_a_token(scale):
        return False
    x, *halves = rotary.inputs
    scaled = []
    for table in halves:
        key = (id(table), graph.scalar(wide(scale)) or id(wide(scale)))
        if key not in tables:
            tables[key] = _scaled(graph, table, scale)
        scaled.append(tables[key])
    graph.replace(product.outputs[0], "RotaryEmbedding", [x, *scaled], dict(rotary.attrs), name=rotary.name)
    return True


def _one_factor_a_token(scale: gs.Tensor) -> bool:
    return rank(scale) == 4 and static_dim(scale, 1) == 1 and static_dim(scale, 3) == 1


def wide(tensor: gs.Tensor) -> gs.Tensor:
    """The float32 tensor that `tensor` is a half-precision cast of, else itself."""
    cast = producer(tensor, "Cast")
    return cast.inputs[0] if cast is not None and is_half(tensor) and not is_half(cast.inputs[0]) else tensor


def _scaled(graph: Graph, table: gs.Tensor, scale: gs.Tensor) -> gs.Tensor:
    """table * scale, [B, S, D/2], in the table's type; in float32 up to the last where the table came from float32."""
    base, factor = wide(table), wide(scale)
    dtype, number = onnx_type(base), graph.scalar(factor)
    if number is not None:
        factor = graph.number(number, dtype)
    else:
        factor = graph.new("Squeeze", [factor, graph.int64([1])])
        if onnx_type(factor) != dtype:
            factor = graph.new("Cast", [factor], {"to": dtype}, dtype=dtype)
    product = graph.new("Mul", [base, factor], shape=base.shape)
    if dtype == onnx_type(table):
        return product
    to = onnx_type(table)
    return graph.new("Cast", [product], {"to": to}, dtype=to, shape=table.shape)

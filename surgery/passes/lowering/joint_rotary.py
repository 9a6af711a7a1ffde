"""Query and key of one packed projection are rotated together, as the heads of one tensor.

    q, k, v = split(heads);  rotate(q), rotate(k)   →   qk, v = split(heads);  q, k = split(rotate(qk))

Where the query's own tables are the key's times a factor of each token, that factor goes back to the query: rotation is
linear. TensorRT then writes rotation, factor, scale and both cache updates of a decode step as one kernel, nine kernels a
layer in all.
"""

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, onnx_type, operands, producer, static_dim
from suture.surgery.passes.portable.packed_heads import split_heads
from suture.surgery.passes.portable.query_scale import wide


def run(graph: Graph) -> int:
    factors: dict[tuple[int, int], gs.Tensor] = {}
    return graph.match(lambda graph, node: _join(graph, node, factors), graph.nodes("Split"))


def _join(graph: Graph, split: gs.Node, factors: dict[tuple[int, int], gs.Tensor]) -> bool:
    if len(split.outputs) != 3 or split.attrs.get("axis", 0) != 1:
        return False
    query, key, value = split.outputs
    rotations = [_rotation(heads) for heads in (query, key)]
    if any(rotation is None for rotation in rotations):
        return False
    need(rotations[0].attrs == rotations[1].attrs, "query and key are rotated in different ways")
    tables, factor = rotations[1].inputs[1:], None
    if [id(table) for table in rotations[0].inputs[1:]] != [id(table) for table in tables]:
        factor = _factor(*rotations)
        need(factor is not None, "query and key are rotated by different tables")
    counts = [static_dim(heads, 1) for heads in split.outputs]
    need(all(counts), "the number of the heads is not known")

    batch, _, steps, head_dim = query.shape
    dtype = onnx_type(query)
    together = gs.Variable(graph.unique(f"{split.name}/query_key"), dtype, [batch, counts[0] + counts[1], steps, head_dim])
    split_heads(graph, split.name, split.inputs[0], [together, value], [counts[0] + counts[1], counts[2]])
    rotated = graph.new("RotaryEmbedding", [together, *tables], dict(rotations[0].attrs), shape=together.shape)
    outputs = [rotation.outputs[0] for rotation in rotations]
    if factor is not None:
        if (id(factor), dtype) not in factors:
            factors[id(factor), dtype] = _for_heads(graph, factor, dtype)
        unscaled = gs.Variable(graph.unique(f"{query.name}/rotated"), dtype, query.shape)
        graph.replace(outputs[0], "Mul", [unscaled, factors[id(factor), dtype]])
        outputs[0] = unscaled
    split_heads(graph, f"{split.name}_rotated", rotated, outputs, counts[:2])
    return True


def _rotation(heads: gs.Tensor) -> gs.Node | None:
    """The RotaryEmbedding that alone reads these heads, its tables [B, S, D/2] in the graph."""
    node = only_consumer(heads, "RotaryEmbedding")
    return node if node is not None and len(node.inputs) == 3 else None


def _factor(query: gs.Node, key: gs.Node) -> gs.Tensor | None:
    """s, [B, S, 1] or a number, if both tables of the query are the key's times s."""
    found = []
    for own, shared in zip(query.inputs[1:], key.inputs[1:]):
        product = producer(wide(own), "Mul")
        found += [right for left, right in operands(product) if left is wide(shared)] if product is not None else []
    return found[0] if len(found) == 2 and found[0] is found[1] else None


def _for_heads(graph: Graph, factor: gs.Tensor, dtype: int) -> gs.Tensor:
    """The factor as [B, 1, S, 1] in the query's type."""
    if onnx_type(factor) != dtype:
        factor = graph.new("Cast", [factor], {"to": dtype}, dtype=dtype)
    return factor if graph.scalar(wide(factor)) is not None else graph.new("Unsqueeze", [factor, graph.int64([1])])

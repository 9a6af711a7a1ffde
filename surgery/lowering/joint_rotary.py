"""Query and key of one packed projection are rotated together, as the heads of one tensor.

    q, k, v = split(qkv);  rotate(heads(q)), rotate(heads(k)), heads(v)
        →  qk, v = split(heads(qkv));  q, k = split(rotate(qk))        heads(x): [B, S, n*D] → [B, n, S, D]

One transpose instead of three and one RotaryEmbedding instead of two; TensorRT then writes rotation, scale and both cache
updates of a decode step as one kernel, nine kernels a layer in all.
"""

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import Graph, need, only_consumer, onnx_type, rank, static_dim

HEADS_FIRST = [0, 2, 1, 3]


def run(graph: Graph) -> int:
    return graph.match(_join, graph.nodes("Split"))


def _join(graph: Graph, split: gs.Node) -> bool:
    if len(split.outputs) != 3:
        return False
    heads = [_heads(part) for part in split.outputs]
    if any(transposed is None for transposed in heads):
        return False
    query, key, value = heads
    rotations = [_rotation(tensor) for tensor in (query, key)]
    if any(rotation is None for rotation in rotations):
        return False
    tables = [[id(table) for table in rotation.inputs[1:]] for rotation in rotations]
    need(tables[0] == tables[1], "query and key are rotated by different tables")
    need(rotations[0].attrs == rotations[1].attrs, "query and key are rotated in different ways")
    sizes = [(static_dim(tensor, 1), static_dim(tensor, 3)) for tensor in heads]
    need(all(count and size for count, size in sizes), "the number or size of the heads is not known")
    need(len({size for _, size in sizes}) == 1, "query, key and value heads differ in size")
    counts, head_dim = [count for count, _ in sizes], sizes[0][1]

    packed, dtype = split.inputs[0], onnx_type(split.inputs[0])
    tokens = graph.input(graph.signature.tokens)
    rows = graph.new("Shape", [tokens], {"start": 0, "end": 2}, dtype=np.int64, shape=[2])
    target = graph.new("Concat", [rows, graph.int64([sum(counts), head_dim])], {"axis": 0}, dtype=np.int64, shape=[4])
    batch, steps = query.shape[0], query.shape[2]
    shape = [batch, steps, sum(counts), head_dim]
    joined = graph.new("Reshape", [packed, target], shape=shape)
    joined = graph.new("Transpose", [joined], {"perm": HEADS_FIRST}, shape=[batch, sum(counts), steps, head_dim])
    together = gs.Variable(graph.unique(f"{split.name}/query_key"), dtype, [batch, counts[0] + counts[1], steps, head_dim])
    _split(graph, split.name, joined, [together, value], [counts[0] + counts[1], counts[2]])
    rotated = graph.new("RotaryEmbedding", [together, *rotations[0].inputs[1:]], dict(rotations[0].attrs), shape=together.shape)
    _split(graph, f"{split.name}_rotated", rotated, [rotation.outputs[0] for rotation in rotations], counts[:2])
    return True


def _heads(part: gs.Tensor) -> gs.Tensor | None:
    """[B, n, S, D], if the only use of a part of the packed projection is to be seen as that."""
    reshape = only_consumer(part, "Reshape")
    transpose = only_consumer(reshape.outputs[0], "Transpose") if reshape is not None else None
    if transpose is None or list(transpose.attrs["perm"]) != HEADS_FIRST or rank(reshape.outputs[0]) != 4:
        return None
    return transpose.outputs[0]


def _rotation(heads: gs.Tensor) -> gs.Node | None:
    """The RotaryEmbedding that alone reads these heads, its tables [B, S, D/2] in the graph."""
    node = only_consumer(heads, "RotaryEmbedding")
    return node if node is not None and len(node.inputs) == 3 else None


def _split(graph: Graph, name: str, source: gs.Tensor, outputs: list[gs.Variable], counts: list[int]) -> None:
    """Splits heads (axis 1) into `outputs`, which it takes from whatever made them."""
    for output in outputs:
        output.inputs.clear()
    graph.gs.nodes.append(gs.Node("Split", graph.unique(name), {"axis": 1}, [source, graph.int64(counts)], outputs))

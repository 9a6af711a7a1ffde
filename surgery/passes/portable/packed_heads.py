"""Heads of one packed projection are laid out together and taken apart after.

    a, b, ... = split(x);  heads(a), heads(b), ...   →   a, b, ... = split(heads(x), axis=1)

heads(x): [B, S, n*D] → [B, n, S, D]. One transpose instead of one for each of query, key and value.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, rank, static_dim

HEADS_FIRST = [0, 2, 1, 3]


def run(graph: Graph) -> int:
    return graph.match(_pack, graph.nodes("Split"))


def _pack(graph: Graph, split: gs.Node) -> bool:
    packed = split.inputs[0]
    if graph.signature.tokens is None:  # an encoder's rows are not [B, S]
        return False
    if rank(packed) not in (2, 3) or split.attrs.get("axis", 0) not in (-1, rank(packed) - 1):
        return False
    heads = [_heads(part) for part in split.outputs]
    if any(transposed is None for transposed in heads):
        return False
    sizes = [(static_dim(tensor, 1), static_dim(tensor, 3)) for tensor in heads]
    need(all(count and size for count, size in sizes), "the number or size of the heads is not known")
    need(len({size for _, size in sizes}) == 1, "the parts' heads differ in size")
    widths = [static_dim(part, rank(packed) - 1) for part in split.outputs]
    need(widths == [count * size for count, size in sizes], "the parts are not whole heads")
    counts, head_dim = [count for count, _ in sizes], sizes[0][1]

    tokens = graph.input(graph.signature.tokens)
    rows = graph.new("Shape", [tokens], {"start": 0, "end": 2}, dtype=np.int64, shape=[2])
    target = graph.new("Concat", [rows, graph.int64([sum(counts), head_dim])], {"axis": 0}, dtype=np.int64, shape=[4])
    batch, _, steps, _ = heads[0].shape
    module = (packed.inputs[0] if packed.inputs else split).name.rpartition("/")[0]  # exporters' splits have none
    shapes = [batch, steps, sum(counts), head_dim], [batch, sum(counts), steps, head_dim]
    apart = graph.new("Reshape", [packed, target], {"allowzero": 1}, f"{module}/heads", shape=shapes[0])
    together = graph.new("Transpose", [apart], {"perm": HEADS_FIRST}, f"{module}/transpose", shape=shapes[1])
    split_heads(graph, f"{module}/split", together, heads, counts)
    return True


def split_heads(graph: Graph, name: str, source: gs.Tensor, outputs: list[gs.Variable], counts: list[int]) -> None:
    """Splits heads (axis 1) into `outputs`, which it takes from whatever made them."""
    for output in outputs:
        output.inputs.clear()
    graph.gs.nodes.append(gs.Node("Split", graph.unique(name), {"axis": 1}, [source, graph.int64(counts)], outputs))


def _heads(part: gs.Tensor) -> gs.Variable | None:
    """[B, n, S, D], if the only use of a part of the packed projection is to be seen as that."""
    reshape = only_consumer(part, "Reshape")
    transpose = only_consumer(reshape.outputs[0], "Transpose") if reshape is not None else None
    if transpose is None or list(transpose.attrs.get("perm", [])) != HEADS_FIRST or rank(reshape.outputs[0]) != 4:
        return None
    return transpose.outputs[0]

"""onnxruntime's RotaryEmbedding becomes the standard one, over heads first.

com.microsoft.RotaryEmbedding(x, positions, cos, sin)  →  RotaryEmbedding(x [B, heads, S, head_dim], cos, sin, positions)

x may also come as [B, S, heads * head_dim]; num_heads = 0 then means that the tables span a whole head. Positions may
come as one number, where the step begins.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, inputs_of, need, rank, static_dim
from suture.surgery.masks.mask_builders import count_up, length_of
from suture.surgery.passes.import_contrib.nodes import contrib_nodes, heads_first, merge_heads


def run(graph: Graph) -> int:
    return graph.match(_standard, contrib_nodes(graph, "RotaryEmbedding"))


def _standard(graph: Graph, node: gs.Node) -> bool:
    x, positions, cos, sin = inputs_of(node, "input", "position_ids", "cos_cache", "sin_cache")
    need(not node.attrs.get("is_packed_batching", 0), "rows of the batch are packed into one")
    need(node.attrs.get("scale", 1.0) == 1.0, "it scales positions")
    need(rank(x) in (3, 4), f"x has rank {rank(x)}, not 3 or 4")
    need(rank(positions) in (1, 2), f"positions have rank {rank(positions)}, not 1 or 2")
    width = static_dim(cos, -1)
    need(rank(cos) == 2 and width, "cos is not a table whose width is known")
    rotated_dims = 2 * width
    heads = static_dim(x, 1) if rank(x) == 4 else node.attrs.get("num_heads", 0)
    head_dim = static_dim(x, 3) if rank(x) == 4 else None
    if rank(x) == 3:
        hidden = static_dim(x, 2)
        need(hidden, "the size of x is not known")
        heads = heads or hidden // rotated_dims
        head_dim = hidden // heads
        need(heads * head_dim == hidden, f"{hidden} features do not divide into {heads} heads")
    need(head_dim and rotated_dims <= head_dim, f"tables for {rotated_dims} dimensions do not fit a head of {head_dim}")
    if rank(positions) == 1:
        positions = _counted(graph, x, positions, node.name)
    interleaved, result = node.attrs.get("interleaved", 0), node.outputs[0]
    if rank(x) == 4:
        rotate(graph, x, cos, sin, positions, interleaved, node.name, result)
        return True
    apart = heads_first(graph, x, heads, head_dim, node.name)
    merge_heads(graph, rotate(graph, apart, cos, sin, positions, interleaved, node.name), result, heads, head_dim, node.name)
    return True


def rotate(
    graph: Graph, x_BHSD: gs.Tensor, cos: gs.Tensor, sin: gs.Tensor, positions_BS: gs.Tensor, interleaved: int, name: str,
    result: gs.Variable | None = None,
) -> gs.Tensor:  # fmt: skip
    """RotaryEmbedding of the first 2 * (the tables' width) dimensions of each head, into `result` if given."""
    rotated_dims, attrs = 2 * static_dim(cos, -1), {"interleaved": interleaved}
    if rotated_dims != static_dim(x_BHSD, 3):
        attrs["rotary_embedding_dim"] = rotated_dims
    inputs = [x_BHSD, cos, sin, positions_BS]
    if result is not None:
        graph.replace(result, "RotaryEmbedding", inputs, attrs)
        return result
    return graph.new("RotaryEmbedding", inputs, attrs, name, shape=x_BHSD.shape)


def _counted(graph: Graph, x: gs.Tensor, first: gs.Tensor, name: str) -> gs.Tensor:
    """Positions [B, S] that count up from `first`, int64 [1], in every row."""
    axis = 2 if rank(x) == 4 else 1
    steps, batch = length_of(graph, x, axis, f"{name}/steps"), length_of(graph, x, 0, f"{name}/batch")
    count = count_up(graph, steps, f"{name}/count")
    row = graph.new("Add", [count, first], name=f"{name}/row", dtype=np.int64)
    shape = graph.new("Concat", [batch, steps], {"axis": 0}, f"{name}/positions", np.int64, [2])
    return graph.new("Expand", [row, shape], name=f"{name}/positions", dtype=np.int64, shape=["batch", "sequence"])

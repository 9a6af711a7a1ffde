"""Attention over tokens first gets heads of its own, the only form of it that TensorRT's fused attention takes.

Attention(q [B, S, H * D], k, v, q_num_heads, kv_num_heads)
    →  tokens_first(Attention(heads_first(q) [B, H, S, D], heads_first(k), heads_first(v)))
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, need, onnx_type, rank, set_inputs, static_dim
from suture.surgery.passes.portable.packed_heads import HEADS_FIRST

COUNTS = ("q_num_heads", "kv_num_heads")


def run(graph: Graph) -> int:
    return graph.match(_apart, graph.nodes("Attention"))


def _apart(graph: Graph, attention: gs.Node) -> bool:
    if rank(input_of(attention, "Q")) != 3:
        return False
    heads, kv_heads = (attention.attrs.get(name, 0) for name in COUNTS)
    need(heads and kv_heads, "its numbers of heads are not given")
    result, values = attention.outputs[0], input_of(attention, "V")
    rows, sizes = list(input_of(attention, "Q").shape[:2]), [static_dim(values, 2), kv_heads]
    need(sizes[0], "the size of its values is not known")
    value_dim = sizes[0] // kv_heads
    attention.attrs = {name: given for name, given in attention.attrs.items() if name not in COUNTS}
    for name, count in (("Q", heads), ("K", kv_heads), ("V", kv_heads)):
        apart = _heads_first(graph, input_of(attention, name), count, f"{attention.name}/{name.lower()}")
        set_inputs(attention, **{name: apart})
    context = gs.Variable(graph.unique(f"{attention.name}/heads"), onnx_type(result), [rows[0], heads, rows[1], value_dim])
    attention.outputs[0] = context
    shape = [*rows, heads, value_dim]
    turned = graph.new("Transpose", [context], {"perm": HEADS_FIRST}, f"{attention.name}/transpose", shape=shape)
    graph.replace(result, "Reshape", [turned, graph.int64([0, 0, heads * value_dim])], name=f"{attention.name}/rows")
    return True


def _heads_first(graph: Graph, x: gs.Tensor, heads: int, name: str) -> gs.Variable:
    batch, steps, width = x.shape
    size = width // heads if isinstance(width, int | np.integer) else None
    apart = [batch, steps, heads, size]
    split = graph.new("Reshape", [x, graph.int64([0, 0, heads, size or -1])], name=f"{name}/reshape", shape=apart)
    return graph.new("Transpose", [split], {"perm": HEADS_FIRST}, f"{name}/transpose", shape=[batch, heads, steps, size])

"""What the passes over com.microsoft ops ask of a node: its domain, what has no standard form, its heads."""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, input_of, need, output_of, producer, rank, static_dim
from suture.surgery.shapes.foreign_shapes import DOMAIN


def contrib_nodes(graph: Graph, *ops: str) -> list[gs.Node]:
    """The nodes of these ops in onnxruntime's domain; the standard has ops of the same names."""
    return graph.nodes(*ops, domain=DOMAIN)


def refuse_outputs(graph: Graph, node: gs.Node, *names: str) -> None:
    """Raises NoMatch where one of these outputs is used, since no standard op computes it."""
    for name in names:
        tensor = output_of(node, name)
        need(tensor is None or not (tensor.outputs or graph.is_output(tensor)), f"its output {name} is used")


def refuse_inputs(node: gs.Node, *names: str) -> None:
    for name in names:
        need(input_of(node, name) is None, f"the input {name} has no standard form")


def heads_first(graph: Graph, x: gs.Tensor, heads: int, head_dim: int, name: str) -> gs.Tensor:
    """[B, S, heads * head_dim] as [B, heads, S, head_dim]; what was just merged that way is not merged and split again."""
    if (apart := _merged(graph, x, heads, head_dim)) is not None:
        return apart
    batch, steps = list(x.shape[:2]) if rank(x) == 3 else ["batch", "sequence"]
    tokens = graph.input(graph.signature.tokens) if graph.signature.tokens else x
    source = tokens if rank(tokens) in (2, 3) and list(tokens.shape[:2]) == [batch, steps] else x
    rows = graph.new("Shape", [source], {"start": 0, "end": 2}, name=f"{name}/rows", dtype=np.int64, shape=[2])
    target = [rows, graph.int64([heads, head_dim])]
    target = graph.new("Concat", target, {"axis": 0}, name=f"{name}/shape", dtype=np.int64, shape=[4])
    split = graph.new("Reshape", [x, target], name=f"{name}/reshape", shape=[batch, steps, heads, head_dim])
    shape = [batch, heads, steps, head_dim]
    return graph.new("Transpose", [split], {"perm": [0, 2, 1, 3]}, name=f"{name}/transpose", shape=shape)


def merge_heads(graph: Graph, x_BHSD: gs.Tensor, out: gs.Variable, heads: int, head_dim: int, name: str) -> None:
    """Makes `out`, [B, S, heads * head_dim], of [B, heads, S, head_dim]."""
    batch, steps = list(out.shape[:2]) if rank(out) == 3 else ["batch", "sequence"]
    shape = [batch, steps, heads, head_dim]
    turned = graph.new("Transpose", [x_BHSD], {"perm": [0, 2, 1, 3]}, name=f"{name}/transpose", shape=shape)
    graph.replace(out, "Reshape", [turned, graph.int64([0, 0, heads * head_dim])], name=f"{name}/reshape")
    out.shape = [batch, steps, heads * head_dim]


def _merged(graph: Graph, x: gs.Tensor, heads: int, head_dim: int) -> gs.Tensor | None:
    """What `x` is, transposed and reshaped, if that only put its heads side by side."""
    reshape = producer(x, "Reshape")
    transpose = producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    if transpose is None or list(transpose.attrs.get("perm", [])) != [0, 2, 1, 3] or rank(x) not in (3, None):
        return None
    apart, target = transpose.inputs[0], graph.constant(reshape.inputs[1])
    side_by_side = target is not None and target.tolist() in ([0, 0, heads * head_dim], [0, -1, heads * head_dim])
    return apart if side_by_side and (static_dim(apart, 1), static_dim(apart, 3)) == (heads, head_dim) else None

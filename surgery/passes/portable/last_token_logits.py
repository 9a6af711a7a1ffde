"""Logits at each sequence's last valid token only, [batch, 1, vocab]: the vocabulary's product shrinks from S rows to 1.

head(h)  →  head(h at [b, max(sequence_lengths[b], 1) - 1])        h: the rows that enter the last norm, or the head
"""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, onnx_type, op_of, producer, rank, static_dim
from suture.surgery.masks.mask_builders import sequence_lengths

ROW_WISE = ("RMSNormalization", "LayerNormalization", "Gemm", "MatMul", "Reshape", "Mul", "Add", "Cast", "Tanh", "Div")


def run(graph: Graph) -> int:
    logits = next(tensor for tensor in graph.gs.outputs if tensor.name == graph.signature.logits)
    return graph.match(_gather_before_head, logits.inputs)


def _gather_before_head(graph: Graph, last: gs.Node) -> bool:
    hidden = _hidden(graph, last)
    lengths = sequence_lengths(graph)
    tokens = graph.input(graph.signature.tokens)
    readers = list(hidden.outputs)
    one = graph.int64([1])
    index = graph.new("Sub", [graph.new("Max", [lengths, one], shape=["batch"]), one], shape=["batch"])
    steps = graph.new("Shape", [tokens], {"start": 1, "end": 2}, dtype=np.int64, shape=[1])
    batch = graph.new("Squeeze", [graph.new("Shape", [tokens], {"start": 0, "end": 1}, dtype=np.int64)])
    zero, single = graph.int64(0), graph.int64(1)
    row = graph.new("Range", [zero, batch, single], dtype=np.int64, shape=["batch"])
    flat = graph.new("Add", [graph.new("Mul", [row, steps], shape=["batch"]), index], shape=["batch"])
    picked = graph.new("Gather", [hidden, flat], {"axis": 0}, "last_token", shape=["batch", static_dim(hidden, 1)])
    for node in readers:
        node.inputs = [picked if tensor is hidden else tensor for tensor in node.inputs]
    reshape = last
    need(op_of(reshape) == "Reshape", "the logits are not rows seen as [batch, sequence, vocab]")
    vocab = static_dim(reshape.outputs[0], 2)
    need(vocab is not None, "the size of the vocabulary is not known")
    reshape.inputs[1] = graph.int64([-1, 1, vocab])
    reshape.outputs[0].shape = ["batch", 1, vocab]
    graph.interface.outputs.pop(graph.signature.logits, None)
    graph.signature = replace(graph.signature, last_only=True)
    return True


def _hidden(graph: Graph, last: gs.Node) -> gs.Tensor:
    """The rows [B*S, features] above the head: as far up as every node works on rows alone and feeds only the logits."""
    need(op_of(last) == "Reshape" and rank(last.inputs[0]) == 2, "the logits do not come from rows of tokens")
    tensor = last.inputs[0]
    while (node := producer(tensor, *ROW_WISE)) is not None and len(tensor.outputs) == 1:
        above = [operand for operand in node.inputs if isinstance(operand, gs.Variable) and not operand.is_empty()]
        if len(above) != 1 or node.op == "Reshape" or rank(above[0]) != 2 or not _row_by_row(node, above[0]):
            break
        tensor = above[0]
    need(onnx_type(tensor) is not None and rank(tensor) == 2, "nothing above the logits is a row of hidden features")
    return tensor


def _row_by_row(node: gs.Node, rows: gs.Tensor) -> bool:
    """Whether a row of the result comes from that row of `rows` [N, features] alone."""
    if node.op in ("MatMul", "Gemm"):
        return node.inputs[0] is rows and not node.attrs.get("transA", 0)
    return not node.op.endswith("Normalization") or node.attrs.get("axis", -1) in (-1, 1)

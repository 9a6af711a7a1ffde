"""A product with a transposed weight becomes a Gemm over the weight as the checkpoint has it, [out, in].

    x @ W^T + b   →   reshape(Gemm(reshape(x, [-1, in]), W, b, transB=1), [B, S, out])

Nothing then copies or transposes a weight: not onnxruntime when it loads, not an engine that takes weights as inputs.
"""

import numpy as np
import onnx_graphsurgeon as gs

from surgery.graph import Graph, need, only_consumer, onnx_type, other_input, producer, rank, static_dim


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("MatMul"))


def _fuse(graph: Graph, product: gs.Node) -> bool:
    x, transposed = product.inputs
    transpose = producer(transposed, "Transpose")
    if transpose is None or not isinstance(transpose.inputs[0], gs.Constant):
        return False
    weight = transpose.inputs[0]
    need(
        list(transpose.attrs.get("perm", [1, 0])) == [1, 0] and rank(weight) == 2, "the weight is not a plain transpose"
    )
    need(rank(x) in (2, 3), f"x has rank {rank(x)}, not [batch, sequence, features]")
    result, bias = product.outputs[0], None
    add = only_consumer(result, "Add")
    if add is not None and _is_bias(addend := other_input(add, result), weight, onnx_type(x)):
        bias, result = addend, add.outputs[0]
    features = int(weight.shape[1])
    flat = x if rank(x) == 2 else graph.new("Reshape", [x, graph.int64([-1, features])], shape=["tokens", features])
    inputs = [flat, weight] if bias is None else [flat, weight, bias]
    if rank(x) == 2:
        graph.replace(result, "Gemm", inputs, {"transB": 1})
        return True
    outputs = int(weight.shape[0])
    gemm = graph.new("Gemm", inputs, {"transB": 1}, name=product.name, shape=["tokens", outputs])
    graph.replace(result, "Reshape", [gemm, rows_by(graph, x, outputs)])
    return True


def _is_bias(tensor: gs.Tensor, weight: gs.Constant, dtype: int) -> bool:
    return rank(tensor) == 1 and static_dim(tensor, 0) == int(weight.shape[0]) and onnx_type(tensor) == dtype


def rows_by(graph: Graph, x: gs.Tensor, features: int) -> gs.Tensor:
    """The shape [B, S, features], with x's own B and S: int64 [3]."""
    tokens = graph.input(graph.signature.tokens)
    source = tokens if x.shape is not None and list(x.shape[:2]) == list(tokens.shape) else x
    rows = graph.new("Shape", [source], {"start": 0, "end": 2}, dtype=np.int64, shape=[2])
    return graph.new("Concat", [rows, graph.int64([features])], {"axis": 0}, dtype=np.int64, shape=[3])

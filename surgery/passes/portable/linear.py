"""A product with a weight becomes a Gemm over rows of tokens and over the weight as its file has it.

    x @ W^T + b   →   reshape(Gemm(reshape(x, [-1, in]), W, b, transB=1), [B, S, out])        W [out, in]
    x @ W + b     →   reshape(Gemm(reshape(x, [-1, in]), W, b), [B, S, out])                  W [in, out]
    x @ W         →   reshape(MatMul(reshape(x, [-1, in]), W), [B, S, out])                   W dequantised

Nothing then copies or transposes a weight: not onnxruntime when it loads, not an engine that takes weights as inputs. A
dequantised weight stays with a MatMul, the one op that onnxruntime fuses it into.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, onnx_type, other_input, producer, rank, static_dim


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("MatMul"))


def _fuse(graph: Graph, product: gs.Node) -> bool:
    x, factor = product.inputs
    transpose = producer(factor, "Transpose")
    weight = factor if transpose is None else transpose.inputs[0]
    quantised = producer(weight, "DequantizeLinear") is not None
    sizes = static_dim(weight, 0), static_dim(weight, 1)
    if not (quantised or isinstance(weight, gs.Constant)) or rank(weight) != 2 or None in sizes:
        return False
    need(transpose is None or list(transpose.attrs.get("perm", [1, 0])) == [1, 0], "the weight is not a plain transpose")
    need(rank(x), "the rank of x is not known")
    op, attrs = ("Gemm", {}) if transpose is None else ("Gemm", {"transB": 1})
    if quantised and transpose is None:
        op = "MatMul"
        if rank(x) == 2:
            return False  # it is in this form
    features, outputs = sizes if transpose is None else sizes[::-1]
    result, bias = product.outputs[0], None
    add = only_consumer(result, "Add") if op == "Gemm" else None
    if add is not None and _is_bias(addend := other_input(add, result), outputs, onnx_type(x)):
        bias, result = addend, add.outputs[0]
    flat = x if rank(x) == 2 else graph.new("Reshape", [x, graph.int64([-1, features])], shape=["tokens", features])
    inputs = [flat, weight] if bias is None else [flat, weight, bias]
    if rank(x) == 2:
        graph.replace(result, op, inputs, attrs)
        return True
    rows = graph.new(op, inputs, attrs, name=product.name, shape=["tokens", outputs])
    graph.replace(result, "Reshape", [rows, rows_by(graph, x, outputs)])
    return True


def _is_bias(tensor: gs.Tensor, outputs: int, dtype: int) -> bool:
    return rank(tensor) == 1 and static_dim(tensor, 0) == outputs and onnx_type(tensor) == dtype


def rows_by(graph: Graph, x: gs.Tensor, features: int) -> gs.Tensor:
    """The shape [B, S, features], with x's own B and S (and whatever else precedes its last axis): int64 [rank of x]."""
    leading = rank(x) - 1
    if all(static_dim(x, axis) is not None for axis in range(leading)):
        return graph.int64([*(static_dim(x, axis) for axis in range(leading)), features])
    tokens = next((tensor for tensor in graph.gs.inputs if tensor.name == graph.signature.tokens), x)
    source = tokens if leading == 2 and list(x.shape[:2]) == list(tokens.shape[:2]) else x
    rows = graph.new("Shape", [source], {"start": 0, "end": leading}, dtype=np.int64, shape=[leading])
    return graph.new("Concat", [rows, graph.int64([features])], {"axis": 0}, dtype=np.int64, shape=[leading + 1])

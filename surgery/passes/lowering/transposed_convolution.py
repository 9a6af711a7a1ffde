"""A transposed convolution whose patches do not overlap becomes a product, in bfloat16, in which TensorRT builds no other.

    ConvTranspose(x, W, b), strides k, the kernel's sides          x: [B, C, S1, …], W: [C, M, k1, …], b: [M]
        →  x^T [B, S1, …, C] @ W [C, M·k1·…]  →  [B, S1, …, M, k1, …]  →  [B, M, S1, k1, …]  →  [B, M, S1·k1, …]  + b

Float32 and float16 stay: TensorRT has a kernel for them.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, need, onnx_type, rank, static_dim

TYPES = (TensorProto.BFLOAT16,)


def run(graph: Graph) -> int:
    candidates = [node for node in graph.nodes("ConvTranspose") if onnx_type(node.inputs[0]) in TYPES]
    return graph.match(_rewrite, candidates)


def _rewrite(graph: Graph, node: gs.Node) -> bool:
    x, weight, *bias = node.inputs
    axes = len(weight.shape) - 2
    kernel, attrs = [static_dim(weight, axis) for axis in range(2, 2 + axes)], node.attrs
    need(rank(x) == 2 + axes and None not in [*kernel, static_dim(weight, 1)], "the sizes of x or of its kernel are not known")
    need(list(attrs.get("strides", [1] * axes)) == kernel, "its patches overlap, or leave room between them")
    plain = (
        attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and attrs.get("group", 1) == 1 and "output_shape" not in attrs
    )
    need(plain, "it is padded by itself, or in groups")
    none = (("pads", 0), ("output_padding", 0), ("dilations", 1))
    need(all(set(attrs.get(name, [number])) == {number} for name, number in none), "it has pads or dilations")
    channels, places = static_dim(weight, 1), list(range(axes))
    rows = graph.new("Transpose", [x], {"perm": [0, *(2 + place for place in places), 1]})
    columns = graph.new("Reshape", [weight, graph.int64([0, -1])])
    patches = graph.new("MatMul", [rows, columns])
    patches = graph.new("Reshape", [patches, graph.int64([0] * (1 + axes) + [channels, *kernel])])
    pairs = [axis for place in places for axis in (1 + place, 2 + axes + place)]
    patches = graph.new("Transpose", [patches], {"perm": [0, 1 + axes, *pairs]})
    result, target = node.outputs[0], _sizes(graph, x, channels, kernel)
    if not bias or bias[0].is_empty():
        graph.replace(result, "Reshape", [patches, target], name=node.name)
        return True
    whole = graph.new("Reshape", [patches, target])
    shifts = graph.new("Reshape", [bias[0], graph.int64([channels] + [1] * axes)])
    graph.replace(result, "Add", [whole, shifts], name=node.name)
    return True


def _sizes(graph: Graph, x: gs.Tensor, channels: int, kernel: list[int]) -> gs.Tensor:
    """int64 [0, M, S1·k1, …]"""
    known = [static_dim(x, 2 + place) for place in range(len(kernel))]
    if None not in known:
        return graph.int64([0, channels, *(size * side for size, side in zip(known, kernel))])
    sides = graph.new("Shape", [x], {"start": 2}, dtype=np.int64, shape=[len(kernel)])
    sides = graph.new("Mul", [sides, graph.int64(kernel)], dtype=np.int64, shape=[len(kernel)])
    return graph.new("Concat", [graph.int64([0, channels]), sides], {"axis": 0}, dtype=np.int64, shape=[2 + len(kernel)])

"""Parts of a product are cut out along an axis of their own instead of its last one.

    split(x W, widths)   →   heads = reshape(x W, [rows, n, d]);  reshape(split(heads, widths / d, axis=1), [rows, width])

d: the widths' greatest common divisor; n: how many there are of it. TensorRT otherwise cuts the weight in place of the
product, sees products of the same rows, and joins their weights again: copies that it holds until the engine is written,
of Qwen-7B's gate and up 180 MB a layer. Along an axis of its own the weight stays mapped from its file, and the kernels
are as many, since the cut is part of whatever reads the parts.
"""

import math

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, last_axis, need, only_consumer, producer, rank, static_dim


def run(graph: Graph) -> int:
    return graph.match(_split, graph.nodes("Split"))


def _split(graph: Graph, split: gs.Node) -> bool:
    packed, parts = split.inputs[0], list(split.outputs)
    product = producer(packed, "Gemm", "MatMul")
    if product is None or not _is_weight(product.inputs[1]) or rank(packed) != 2:
        return False
    if not last_axis(split.attrs.get("axis", 0), packed):
        return False
    need(only_consumer(packed) is not None, "the product is read whole, too")
    widths = [static_dim(part, 1) for part in parts]
    need(all(widths), "the parts' widths are not known")
    step = math.gcd(*widths)
    need(step > 1, "the parts' widths have no common divisor")

    rows, counts = packed.shape[0], [width // step for width in widths]
    heads = graph.new(
        "Reshape", [packed, graph.int64([0, -1, step])], name=f"{split.name}/apart", shape=[rows, sum(counts), step]
    )
    cut = [gs.Variable(graph.unique(f"{part.name}/apart"), part.dtype, [rows, n, step]) for part, n in zip(parts, counts)]
    for part, piece, width in zip(parts, cut, widths):
        graph.replace(part, "Reshape", [piece, graph.int64([0, width])], name=f"{split.name}/part")
    split.inputs, split.outputs, split.attrs = [heads, graph.int64(counts)], cut, {"axis": 1}
    return True


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether it is a constant, quantised or not."""
    quantised = producer(tensor, "DequantizeLinear")
    return isinstance(quantised.inputs[0] if quantised is not None else tensor, gs.Constant)

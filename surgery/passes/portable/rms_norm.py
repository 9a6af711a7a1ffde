"""RMSNorm, written out, becomes one RMSNormalization.

    x / sqrt(mean(x^2) + epsilon) * weight        statistics in float32, over the last axis

Matches  x * reciprocal(sqrt(.)),  x * (1 / sqrt(.)),  x / sqrt(.)  and  x * (.)^-0.5,  the square as Pow or Mul, and a
weight that may itself be computed from constants (Gemma's 1 + w). Where half precision is cast to float32 for the
statistics and back before the weight, both casts go: RMSNormalization keeps float32 statistics itself (stash_type 1).
Where it is cast back after the weight, the weight counts in float32, and the casts stay outside.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import (
    Graph,
    is_half,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    operands,
    other_input,
    producer,
    rank,
    static_dim,
)


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("ReduceMean"))


def _fuse(graph: Graph, mean: gs.Node) -> bool:
    x = squared(graph, mean.inputs[0])
    if x is None:
        return False
    over_last_axis(graph, mean, x)
    epsilon, result = normalised(graph, mean.outputs[0], x)
    source, result = narrowed(x, result)
    weight = None
    scale = only_consumer(result, "Mul")
    if scale is not None and rank(other_input(scale, result)) == 1:
        weight, result = other_input(scale, result), scale.outputs[0]
    if weight is None:
        size = static_dim(x, -1)
        need(size, "there is no weight, and the size of the last axis is not known")
        weight = gs.Constant(graph.unique("ones"), np.ones(size, np.float32))
    if onnx_type(weight) != onnx_type(source):
        weight = graph.new("Cast", [weight], {"to": onnx_type(source)}, shape=weight.shape)
    graph.replace(result, "RMSNormalization", [source, weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1})
    return True


def over_last_axis(graph: Graph, mean: gs.Node, x: gs.Tensor) -> None:
    """Ends the match unless `mean` is over the last axis and keeps it."""
    axes = graph.constant(mean.inputs[1]) if len(mean.inputs) > 1 else mean.attrs.get("axes")
    need(axes is not None and last_axis(axes, x), f"the mean runs over axes {axes}, not the last one")
    need(mean.attrs.get("keepdims", 1), "the mean drops its axis")


def narrowed(x: gs.Tensor, result: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """x and the normalised x in half precision, where casts to float32 and back stand around the norm."""
    cast, cast_in = only_consumer(result, "Cast"), producer(x, "Cast")
    if cast is None or cast_in is None or not is_half(cast_in.inputs[0]):
        return x, result
    need(cast.attrs["to"] == onnx_type(cast_in.inputs[0]), "the result is cast to another type than x came in")
    return cast_in.inputs[0], cast.outputs[0]


def squared(graph: Graph, tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is x^2."""
    square = producer(tensor, "Pow", "Mul")
    if square is None:
        return None
    x, other = square.inputs
    return x if (other is x if square.op == "Mul" else graph.scalar(other) == 2) else None


def normalised(graph: Graph, mean: gs.Tensor, x: gs.Tensor) -> tuple[float, gs.Tensor]:
    """epsilon and x / sqrt(mean + epsilon)."""
    add = only_consumer(mean, "Add")
    need(add is not None, "the mean is not used by one Add alone")
    epsilon = graph.scalar(other_input(add, mean))
    need(epsilon is not None, "epsilon is not a constant")
    root = only_consumer(add.outputs[0], "Sqrt", "Pow")
    need(root is not None, "no square root of mean + epsilon follows")
    if root.op == "Pow":
        exponent = graph.scalar(root.inputs[1])
        need(exponent == -0.5, f"mean + epsilon is raised to {exponent}, not -0.5")
        return epsilon, _times(root.outputs[0], x)
    inverse = only_consumer(root.outputs[0], "Reciprocal", "Div")
    need(inverse is not None, "nothing divides by the root")
    if inverse.op == "Div":
        numerator, denominator = inverse.inputs
        need(denominator is root.outputs[0], "the root is divided, not divided by")
        if numerator is x:
            return epsilon, inverse.outputs[0]
        need(graph.scalar(numerator) == 1, "the root divides something else than x")
    return epsilon, _times(inverse.outputs[0], x)


def _times(factor: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    product = only_consumer(factor, "Mul")
    need(product is not None and any(left is x for left, _ in operands(product)), "1 / rms does not multiply x")
    return product.outputs[0]

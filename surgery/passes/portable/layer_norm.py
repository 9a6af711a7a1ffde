"""LayerNorm, written out, becomes one LayerNormalization.

    d / sqrt(mean(d^2) + epsilon) * weight + bias        d = x - mean(x), over the last axis

The root's spellings and the casts around float32 statistics are those of RMSNorm, which is what LayerNorm does to d.
"""

import numpy as np
import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph, need, only_consumer, onnx_type, other_input, producer, rank, static_dim
from suture.surgery.passes.portable.rms_norm import narrowed, normalised, over_last_axis, squared


def run(graph: Graph) -> int:
    return graph.match(_fuse, graph.nodes("ReduceMean"))


def _fuse(graph: Graph, variance: gs.Node) -> bool:
    difference = squared(graph, variance.inputs[0])
    x = _centred(graph, difference) if difference is not None else None
    if x is None:
        return False
    over_last_axis(graph, variance, difference)
    epsilon, result = normalised(graph, variance.outputs[0], difference)
    source, result = narrowed(x, result)
    weight, bias = None, None
    scale = only_consumer(result, "Mul")
    if scale is not None and _is_parameter(other_input(scale, result), x):
        weight, result = other_input(scale, result), scale.outputs[0]
        shift = only_consumer(result, "Add")
        if shift is not None and _is_parameter(other_input(shift, result), x):
            bias, result = other_input(shift, result), shift.outputs[0]
    if weight is None:
        size = static_dim(x, -1)
        need(size, "there is no weight, and the size of the last axis is not known")
        weight = gs.Constant(graph.unique("ones"), np.ones(size, np.float32))
    inputs = [source, *(_cast(graph, tensor, onnx_type(source)) for tensor in (weight, bias) if tensor is not None)]
    graph.replace(result, "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon, "stash_type": 1})
    return True


def _centred(graph: Graph, difference: gs.Tensor) -> gs.Tensor | None:
    """x, if `difference` is x - mean(x)."""
    sub = producer(difference, "Sub")
    mean = producer(sub.inputs[1], "ReduceMean") if sub is not None else None
    if mean is None or mean.inputs[0] is not sub.inputs[0]:
        return None
    over_last_axis(graph, mean, sub.inputs[0])
    return sub.inputs[0]


def _is_parameter(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    return rank(tensor) == 1 and static_dim(tensor, 0) == static_dim(x, -1)


def _cast(graph: Graph, tensor: gs.Tensor, dtype: int) -> gs.Tensor:
    return tensor if onnx_type(tensor) == dtype else graph.new("Cast", [tensor], {"to": dtype}, shape=tensor.shape)

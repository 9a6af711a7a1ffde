"""Normalisation over groups of channels becomes LayerNormalization over each group's elements.

    InstanceNormalization(x, scale, bias)            x: [N, C, D1, …], a group is a channel
    GroupNormalization(x, scale, bias, num_groups)   a group is C / num_groups channels
        →  Reshape(LayerNormalization(Reshape(x, [N, groups, -1]), ones), shape of x) * scale + bias

scale and bias: [C]; left out where they are ones and zeros, as exporters write a GroupNorm's InstanceNormalization. The
statistics are float32 in half precision, too. onnxruntime's CUDA provider has no kernel for InstanceNormalization since
opset 22, and computes GroupNormalization by the operators that define it, in twice LayerNormalization's time.
"""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from suture.surgery.graph import Graph, need, onnx_type, rank, static_dim


def run(graph: Graph) -> int:
    ones: dict[tuple[int, int], gs.Tensor] = {}
    candidates = graph.nodes("InstanceNormalization", "GroupNormalization")
    return graph.match(lambda graph, node: _rewrite(graph, node, ones), candidates)


def _rewrite(graph: Graph, norm: gs.Node, ones: dict[tuple[int, int], gs.Tensor]) -> bool:
    x, scale, bias = norm.inputs
    dims = rank(x)
    need(dims is not None and dims >= 3, "its input's rank is not known, or below 3")
    groups = norm.attrs["num_groups"] if norm.op == "GroupNormalization" else 0
    attrs = {"axis": -1, "epsilon": norm.attrs.get("epsilon", 1e-5), "stash_type": norm.attrs.get("stash_type", 1)}
    grouped = x
    if groups or dims > 3:
        grouped = graph.new("Reshape", [x, graph.int64([0, groups, -1])], shape=_grouped_shape(x, groups))
    normalised = graph.new("LayerNormalization", [grouped, _ones(graph, grouped, ones)], attrs, shape=grouped.shape)
    if grouped is not x:
        normalised = graph.new("Reshape", [normalised, _shape(graph, x)], shape=x.shape)
    for op, parameter, neutral in (("Mul", scale, 1), ("Add", bias, 0)):
        values = graph.constant(parameter)
        if values is None or not np.all(values == neutral):
            normalised = graph.new(op, [normalised, _over_channels(graph, parameter, dims)], shape=x.shape)
    graph.redirect(norm.outputs[0], normalised)
    return True


def _grouped_shape(x: gs.Tensor, groups: int) -> list[int | str | None]:
    """[N, groups, elements of a group]; groups of 0: each channel."""
    sizes = [static_dim(x, axis) for axis in range(1, rank(x))]
    elements = None if None in sizes else int(np.prod(sizes)) // (groups or sizes[0])
    return [x.shape[0], groups or x.shape[1], elements]


def _ones(graph: Graph, x: gs.Tensor, made: dict[tuple[int, int], gs.Tensor]) -> gs.Tensor:
    """The ones that LayerNormalization multiplies by, as many as x's last axis has; a stored tensor may be megabytes."""
    size, dtype = static_dim(x, -1), onnx_type(x)
    if (size, dtype) in made:
        return made[size, dtype]
    length = graph.int64([size]) if size else graph.new("Shape", [x], {"start": 2, "end": 3}, dtype=np.int64, shape=[1])
    value = gs.Constant("value", np.ones(1, np.float32))
    ones = graph.new("ConstantOfShape", [length], {"value": value}, dtype=np.float32, shape=[size])
    if dtype != TensorProto.FLOAT:
        ones = graph.new("Cast", [ones], {"to": dtype}, dtype=dtype, shape=[size])
    if size:
        made[size, dtype] = ones
    return ones


def _shape(graph: Graph, x: gs.Tensor) -> gs.Tensor:
    sizes = [static_dim(x, axis) for axis in range(1, rank(x))]
    if sizes.count(None) > 1:
        return graph.new("Shape", [x], dtype=np.int64, shape=[rank(x)])
    return graph.int64([0, *(-1 if size is None else size for size in sizes)])


def _over_channels(graph: Graph, parameter: gs.Tensor, dims: int) -> gs.Tensor:
    """[C] → [C, 1, …]"""
    axes = graph.int64(list(range(1, dims - 1)))
    return graph.new("Unsqueeze", [parameter, axes], shape=[static_dim(parameter, 0), *[1] * (dims - 2)])

"""LayerNormalization over groups of channels becomes GroupNormalization, for which TensorRT has one kernel.

    Reshape(LayerNormalization(Reshape(x, [N, groups, -1]), ones), [N, C, D1, …]) * scale + bias
        →  GroupNormalization(Reshape(x, [N, C, D1, …]), scale, bias, num_groups = groups)        scale, bias: [C] or none

without the Reshape where x has that shape. One group stays as it is: TensorRT's parser makes of it what it makes of
InstanceNormalization. Casts of half precision to float32 and back around it go, where scale and bias lose nothing by it: the
kernel's statistics are float32 anyway, and each cast would be a kernel of its own.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from suture.surgery.graph import (
    Graph,
    is_half,
    need,
    only_consumer,
    onnx_type,
    other_input,
    producer,
    rank,
    static_dim,
    through,
)
from suture.surgery.graph.files import sort
from suture.surgery.shapes.shape_values import ShapeValues


def run(graph: Graph) -> int:
    candidates = [node for node in graph.nodes("LayerNormalization") if _plain(node)]
    if not candidates:
        return 0
    sort(graph)
    sizes = ShapeValues(graph)
    for node in graph.gs.nodes:
        sizes.learn(node)
    return graph.match(lambda graph, node: _fuse(graph, node, sizes), candidates)


def _plain(norm: gs.Node) -> bool:
    """Over the last of three axes, times ones."""
    scale = norm.inputs[1]
    cast = producer(scale, "Cast")
    filled = producer(cast.inputs[0] if cast is not None else scale, "ConstantOfShape")
    value = filled.attrs.get("value") if filled is not None else None
    ones = value is not None and np.all(value.values == 1)
    return ones and len(norm.inputs) == 2 and rank(norm.inputs[0]) == 3 and norm.attrs.get("axis", -1) in (-1, 2)


def _fuse(graph: Graph, norm: gs.Node, sizes: ShapeValues) -> bool:
    grouping, back = producer(norm.inputs[0], "Reshape"), only_consumer(norm.outputs[0], "Reshape")
    if grouping is None or back is None or back.inputs[0] is not norm.outputs[0]:
        return False
    x, target, result = grouping.inputs[0], back.inputs[1], back.outputs[0]
    dims, groups, channels = rank(result), static_dim(norm.inputs[0], 1), static_dim(result, 1)
    need(dims is not None and dims >= 3 and groups and channels, "its channels or groups are not known")
    need(groups > 1, "TensorRT takes GroupNormalization with one group for InstanceNormalization")
    need(channels % groups == 0, f"{channels} channels in {groups} groups")
    need(_same(sizes, norm.inputs[0], result, axes=1), "it normalises over rows, too")
    if not _same(sizes, x, result):
        values = graph.constant(target)
        need(values is None or 0 not in values[1:], "its result's shape is that of the groups in part")
        x = graph.new("Reshape", [x, target], shape=result.shape)
    result, scale = _parameter(graph, result, "Mul", dims, channels)
    result, bias = _parameter(graph, result, "Add", dims, channels)
    neutral = [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
    given = [_constant(graph, values, onnx_type(x)) if each is None else each for each, values in zip((scale, bias), neutral)]
    x, result, given = _narrowed(graph, x, result, given)
    attrs = {"num_groups": groups, "epsilon": norm.attrs.get("epsilon", 1e-5), "stash_type": norm.attrs.get("stash_type", 1)}
    graph.replace(result, "GroupNormalization", [x, *given], attrs, name=norm.name)
    return True


def _narrowed(
    graph: Graph, x: gs.Tensor, result: gs.Variable, parameters: list[gs.Tensor]
) -> tuple[gs.Tensor, gs.Variable, list[gs.Tensor]]:
    """x, what comes of it and scale and bias in half precision, where casts stand around them."""
    cast_in, cast_out = producer(x, "Cast"), only_consumer(result, "Cast")
    half = onnx_type(cast_in.inputs[0]) if cast_in is not None and is_half(cast_in.inputs[0]) else None
    if half is None or cast_out is None or cast_out.attrs["to"] != half:
        return x, result, parameters
    narrow = [_exactly(graph, each, half) for each in parameters]
    if any(each is None for each in narrow):
        return x, result, parameters
    return cast_in.inputs[0], cast_out.outputs[0], narrow


def _exactly(graph: Graph, parameter: gs.Tensor, half: int) -> gs.Tensor | None:
    """The same numbers in half precision; None where it has not all of them."""
    source = through(parameter, "Reshape", "Unsqueeze", "Cast")
    if onnx_type(source) != half:
        values = graph.constant(source)
        kind = onnx.helper.tensor_dtype_to_np_dtype(half)
        if values is None or not np.array_equal(values.astype(kind).astype(values.dtype), values):
            return None
    return graph.new("Cast", [parameter], {"to": half}, dtype=half, shape=parameter.shape)


def _same(sizes: ShapeValues, a: gs.Tensor, b: gs.Tensor, axes: int | None = None) -> bool:
    """Whether both have the same sizes, on their first `axes` axes."""
    shapes = [sizes.shape(tensor) for tensor in (a, b)]
    if any(shape is None for shape in shapes):
        return False
    first, second = (shape[:axes] for shape in shapes)
    return len(first) == len(second) and None not in first and first == second


def _parameter(graph: Graph, tensor: gs.Tensor, op: str, dims: int, channels: int) -> tuple[gs.Tensor, gs.Tensor | None]:
    """What comes of `tensor` and one number for each channel, and these numbers as [C]; else the tensor and None."""
    node = only_consumer(tensor, op)
    if node is None:
        return tensor, None
    numbers = other_input(node, tensor)
    shape = [1] * (dims - len(numbers.shape or [])) + list(numbers.shape or [])
    if shape != [1, channels, *[1] * (dims - 2)] or onnx_type(numbers) != onnx_type(tensor):
        return tensor, None
    return node.outputs[0], graph.new("Reshape", [numbers, graph.int64([channels])], shape=[channels])


def _constant(graph: Graph, values: np.ndarray, dtype: int) -> gs.Tensor:
    constant = gs.Constant(graph.unique("neutral"), values)
    return constant if onnx_type(constant) == dtype else graph.new("Cast", [constant], {"to": dtype}, dtype=dtype)

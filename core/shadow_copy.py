"""The float32 shadow copy of a graph in 16-bit types: of bfloat16, in which onnxruntime's CPU provider has no arithmetic, or of
float16 too, whose rounding would hide a small difference in meaning.

The shadow copy has the same nodes and the same 16-bit weights, still lying where they were, but computes in float32. So it
proves the structure of a graph and its weights, not how much 16-bit arithmetic rounds.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.core.dtypes import BY_ONNX
from suture.core.subgraphs import all_graphs, subgraphs

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
ONLY_BFLOAT16 = (BFLOAT16,)
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """True if a weight, an input, an output or a cast of the graph is bfloat16."""
    return has_types(model, ONLY_BFLOAT16)


def has_types(model: onnx.ModelProto, types: Collection[int]) -> bool:
    """True if a weight, an input, an output or a cast of the graph is of one of these onnx.TensorProto types."""
    return any(
        any(tensor.data_type in types for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type in types for value in (*graph.input, *graph.output))
        or any(_is_narrow(attribute, types) for node in graph.node for attribute in node.attribute)
        for graph in all_graphs(model.graph)
    )


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime's CPU can run: the float32 shadow copy of a bfloat16 graph, another as it is."""
    return float32_shadow_copy(model) if has_bfloat16(model) else model


def float32_shadow_copy(model: onnx.ModelProto, types: Collection[int] = ONLY_BFLOAT16) -> onnx.ModelProto:
    """A copy in which every tensor of these `types` is float32; external weights of them are cast where they enter."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for function in copy.functions:
        for node in function.node:
            for attribute in node.attribute:
                _widen(attribute, types)
    for graph in all_graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in types:
                value.type.tensor_type.elem_type = FLOAT
        tables = {tensor.name for tensor in graph.initializer if tensor.data_type not in types and np.prod(tensor.dims) > 1}
        for node in list(graph.node):
            if node.op_type == "Cast" and node.input[0] in tables and _is_narrow(node.attribute[0], types):
                _widen_again(graph, node)
                continue
            for attribute in node.attribute:
                _widen(attribute, types)
        casts = [cast for tensor in graph.initializer if (cast := _widen_weight(tensor, types))]
        narrow = {cast.output[0]: cast.input[0] for cast in casts}
        nodes = [each for node in graph.node for each in _gathered_narrow(node, narrow)]
        used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
        used |= {name for node in nodes for inner in subgraphs(node) for name in _read(inner)}
        del graph.node[:]
        graph.node.extend([*(cast for cast in casts if cast.output[0] in used), *nodes])
    return copy


def _gathered_narrow(node: onnx.NodeProto, weights: dict[str, str]) -> list[onnx.NodeProto]:
    """Rows of a table are widened when they have been looked up, so that the whole table never is. `weights`: what those that
    are cast were called, by their name."""
    if node.op_type != "Gather" or node.input[0] not in weights:
        return [node]
    narrow = f"{node.output[0]}.narrow"
    gather = onnx.NodeProto.FromString(node.SerializeToString())
    gather.input[0], gather.output[0] = weights[node.input[0]], narrow
    return [gather, helper.make_node("Cast", [narrow], [node.output[0]], name=f"{narrow}.widened", to=FLOAT)]


def _widen_again(graph: onnx.GraphProto, cast: onnx.NodeProto) -> None:
    """A wide table that is cast is rounded as it is, since surgery writes what comes of it; a single number is kept."""
    name, cast.output[0] = cast.output[0], f"{cast.output[0]}.narrow"
    place = next(index for index, node in enumerate(graph.node) if node.output[0] == cast.output[0])
    graph.node.insert(place + 1, helper.make_node("Cast", [cast.output[0]], [name], name=f"{name}.widened", to=FLOAT))


def _widen_weight(tensor: TensorProto, types: Collection[int]) -> onnx.NodeProto | None:
    if tensor.data_type not in types:
        return None
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(_widened(tensor))
        return None
    name = tensor.name
    tensor.name = f"{name}.{BY_ONNX[tensor.data_type].numpy}"
    return helper.make_node("Cast", [tensor.name], [name], name=f"{name}.widened", to=FLOAT)


def _widen(attribute: onnx.AttributeProto, types: Collection[int]) -> None:
    if not _is_narrow(attribute, types):
        return
    if attribute.type == onnx.AttributeProto.TENSOR:
        attribute.t.CopyFrom(_widened(attribute.t))
    else:
        attribute.i = FLOAT


def _is_narrow(attribute: onnx.AttributeProto, types: Collection[int]) -> bool:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return attribute.t.data_type in types
    return attribute.name in DTYPE_ATTRIBUTES and attribute.i in types


def _widened(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _read(graph: onnx.GraphProto) -> set[str]:
    """What the nodes and the outputs of the graph, and of those inside it, read."""
    names = set()
    for each in all_graphs(graph):
        names |= {name for node in each.node for name in node.input} | {value.name for value in each.output}
    return names

"""The float32 shadow copy of a bfloat16 graph, for onnxruntime, whose CPU provider has no bfloat16 arithmetic.

The shadow copy has the same nodes and the same bfloat16 weights, still lying where they were, but computes in float32. So it
proves the structure of a graph and its weights, not how much bfloat16 arithmetic rounds.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from suture.core.subgraphs import all_graphs

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """True if a weight, an input, an output or a cast of the graph is bfloat16."""
    return any(
        any(tensor.data_type == BFLOAT16 for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in (*graph.input, *graph.output))
        or any(_is_bfloat16(attribute) for node in graph.node for attribute in node.attribute)
        for graph in all_graphs(model.graph)
    )


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime's CPU can run: the float32 shadow copy of a bfloat16 graph, another as it is."""
    return float32_shadow_copy(model) if has_bfloat16(model) else model


def float32_shadow_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every bfloat16 tensor is float32; external bfloat16 weights are cast where they enter."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in all_graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == BFLOAT16:
                value.type.tensor_type.elem_type = FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                _widen(attribute)
        casts = [cast for tensor in graph.initializer if (cast := _widen_weight(tensor))]
        nodes = [each for node in graph.node for each in _gathered_narrow(node, {cast.output[0] for cast in casts})]
        used = {name for node in nodes for name in node.input}
        del graph.node[:]
        graph.node.extend([*(cast for cast in casts if cast.output[0] in used), *nodes])
    return copy


def _gathered_narrow(node: onnx.NodeProto, weights: set[str]) -> list[onnx.NodeProto]:
    """Rows of a table are widened when they have been looked up, so that the whole table never is."""
    if node.op_type != "Gather" or node.input[0] not in weights:
        return [node]
    narrow = f"{node.output[0]}.bfloat16"
    gather = onnx.NodeProto.FromString(node.SerializeToString())
    gather.input[0], gather.output[0] = f"{node.input[0]}.bfloat16", narrow
    return [gather, helper.make_node("Cast", [narrow], [node.output[0]], name=f"{narrow}.widened", to=FLOAT)]


def _widen_weight(tensor: TensorProto) -> onnx.NodeProto | None:
    if tensor.data_type != BFLOAT16:
        return None
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(_widened(tensor))
        return None
    name = tensor.name
    tensor.name = f"{name}.bfloat16"
    return helper.make_node("Cast", [tensor.name], [name], name=f"{name}.widened", to=FLOAT)


def _widen(attribute: onnx.AttributeProto) -> None:
    if not _is_bfloat16(attribute):
        return
    if attribute.type == onnx.AttributeProto.TENSOR:
        attribute.t.CopyFrom(_widened(attribute.t))
    else:
        attribute.i = FLOAT


def _is_bfloat16(attribute: onnx.AttributeProto) -> bool:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return attribute.t.data_type == BFLOAT16
    return attribute.name in DTYPE_ATTRIBUTES and attribute.i == BFLOAT16


def _widened(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

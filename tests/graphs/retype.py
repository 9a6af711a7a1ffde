"""A graph in another float type than its exporter wrote it, as converters make it: every tensor, constant and cast."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def retyped(model: onnx.ModelProto, dtype: int) -> onnx.ModelProto:
    """A copy with `dtype` (an onnx.TensorProto type of two bytes) wherever `model` has float32; masks stay finite."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    scales = {name for node in copy.graph.node if node.op_type == "Resize" for name in node.input[2:3]}  # always float32
    for tensor in copy.graph.initializer:
        if tensor.name not in scales:
            _retype(tensor, dtype)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = dtype
    for node in copy.graph.node:
        floats = []
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _retype(attribute.t, dtype)
            elif attribute.name in ("to", "dtype") and attribute.i == FLOAT:
                attribute.i = dtype
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                floats.append(attribute)
        for attribute in floats:
            values = numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.float32))
            _retype(values, dtype)
            node.attribute.remove(attribute)
            node.attribute.append(helper.make_attribute("value", values))
    return copy


def _retype(tensor: TensorProto, dtype: int) -> None:
    if tensor.data_type == FLOAT:
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        values, most = numpy_helper.to_array(tensor), 6e4 if dtype == TensorProto.FLOAT16 else np.inf
        tensor.CopyFrom(numpy_helper.from_array(np.clip(values, -most, most).astype(kind), tensor.name))

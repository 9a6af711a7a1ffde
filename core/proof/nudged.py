"""A graph whose numbers are off by what rounding them to 16 bits can change: 1.41406, float16's √2, is a 9,000th less.

What such a graph computes otherwise is no difference in meaning, when a fused operator has the exact number.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

UNIT = {TensorProto.FLOAT16: 2.0**-11, TensorProto.BFLOAT16: 2.0**-8}  # how far rounding moves a number, as a part of it
SCALES = ("scale", "softcap")  # numbers that stand as attributes


def with_numbers_nudged(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each 16-bit scalar that its type may not hold exactly, and each attention's scale, is a unit larger."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    used = [unit for kind, unit in UNIT.items() if any(tensor.data_type == kind for tensor in _tensors(copy.graph))]
    for tensor in _tensors(copy.graph):
        if tensor.data_type in UNIT and tensor.data_location != TensorProto.EXTERNAL and np.prod(tensor.dims) == 1:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            if not _is_short(float(value.reshape(()))):
                tensor.CopyFrom(numpy_helper.from_array(value * (1 + UNIT[tensor.data_type]), tensor.name))
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name in SCALES and attribute.type == AttributeProto.FLOAT and not _is_short(attribute.f):
                attribute.f *= 1 + max(used, default=UNIT[TensorProto.FLOAT16])
    return copy


def _is_short(value: float) -> bool:
    """Whether a number has so few bits that nobody rounded it: 0.5, 1, 3, 128."""
    mantissa, _ = np.frexp(value)
    return not np.isfinite(value) or float(mantissa * 16).is_integer()


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)

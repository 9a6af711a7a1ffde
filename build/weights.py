"""Weights as inputs of the engine: it stays small, and the caller binds them from the checkpoint's own files."""

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from suture.core.dtypes import FLOATS
from suture.core.errors import UserError
from suture.core.tensors import external, tensor_bytes

PRODUCTS = ("Gemm", "MatMul", "Gather")


@dataclass(frozen=True)
class Weight:
    """A weight's place: `file` relative to the weights root, `offset` and `bytes` in it."""

    name: str
    file: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def bindable(proto: onnx.ModelProto, model: Path) -> list[Weight]:
    """The weights that can be inputs: matrices of products and embeddings, in floating point, outside the graph's file.

    Vectors stay constants: they are small, and as inputs each norm would become two kernels.
    """
    multiplied = {name for node in proto.graph.node if node.op_type in PRODUCTS for name in node.input}
    found = []
    for tensor, reference in external(proto.graph.initializer):
        if tensor.name in multiplied and len(tensor.dims) >= 2 and tensor.data_type in FLOATS:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            offset = int(reference.get("offset", 0))
            found.append(
                Weight(tensor.name, reference["location"], offset, tensor_bytes(tensor), dtype.name, tuple(tensor.dims))
            )
    if not found:
        raise UserError(model, "no weights outside the graph's file, so none to bind", "take --weights constant")
    return found


def as_inputs(proto: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Turns the initializers called `names` into graph inputs, in place; returns the graph."""
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def constant_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of all initializers, inside the graph's file and outside."""
    outside = sum(tensor_bytes(tensor) for tensor, _ in external(proto.graph.initializer))
    inside = (tensor for tensor in proto.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    return outside + sum(tensor.ByteSize() for tensor in inside)

"""TensorRT's dtypes in torch, and constants from the ONNX file as torch tensors.

torch has no 4-bit dtypes: INT4 travels as int8, FP4 (e2m1) as float16, which holds its values exactly.
"""

import zlib
from pathlib import Path

import numpy as np
import onnx
import torch

from suture.core import dtypes
from suture.core.errors import UserError
from suture.core.network.description import Constant, Packed, WeightReference
from suture.core.weights import weights_root

TORCH = {name: dtypes.torch_dtype(each) for name, each in dtypes.BY_TENSORRT.items()}
NARROW = (torch.float16, torch.bfloat16)
NARROW_IN_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)  # what numpy has no dtype for
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes that FP4 has
PACKED = tuple(each.numpy for each in dtypes.TABLE if each.onnx in dtypes.FOUR_BITS)  # two to a byte


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit floats as float32, in which one operation and one rounding give what a 16-bit operation gives."""
    return tensor.float() if tensor.dtype in NARROW else tensor


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest FP4 value; of two as near, the one with an even mantissa (every second entry)."""
    table = torch.tensor(E2M1, device=x.device)
    distance = (x.abs().unsqueeze(-1) - table).abs()
    even = torch.tensor([0.0, 1e-7] * 4, device=x.device)
    return torch.copysign(table[(distance + even).argmin(-1)], x)


def to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor of `dtype`; ml_dtypes' arrays (bfloat16, fp8, int4, fp4) among them."""
    if array.dtype.kind != "V" and array.dtype.name in np.sctypeDict:
        return torch.from_numpy(np.require(array, requirements="C")).reshape(array.shape).to(dtype)
    if array.dtype.name in ("int4", "uint4"):
        return torch.from_numpy(array.astype(np.int8)).to(dtype)
    if array.dtype.name == "float4_e2m1fn":
        return torch.from_numpy(array.astype(np.float16)).to(dtype)
    bits = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}"))
    return bits.view(dtype).reshape(array.shape)


class Constants:
    """The constants of a network, those that stayed in the ONNX file by name."""

    def __init__(self, model: Path, graph: onnx.ModelProto, root: Path | None = None):
        self.model, self.root = model, weights_root(model) if root is None else root
        self.tensors = dict(_constants(graph.graph))

    def mapped(self, constant: Constant) -> bool:
        """Whether a constant's bytes lie outside the ONNX file."""
        tensor = self.tensors.get(constant.name) if isinstance(constant, WeightReference) else None
        return tensor is not None and tensor.data_location == onnx.TensorProto.EXTERNAL

    def load(self, constant: Constant, dtype: str, check: bool) -> torch.Tensor:
        """A constant layer's value. Raises UserError where the ONNX file does not have it, or, if asked to `check`, has
        another than TensorRT."""
        if isinstance(constant, np.ndarray):
            return to_torch(constant, TORCH[dtype])
        if isinstance(constant, Packed):
            return to_torch(unpack(constant), TORCH[dtype])
        tensor, raw = self._raw(constant)
        if check and constant.checksum is not None and zlib.crc32(raw.data) != constant.checksum:
            raise UserError(self.model, f"TensorRT holds other values of {constant.name} than the file", "report it")
        numpy_dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        packed = numpy_dtype.name in PACKED
        array = _unpacked(tensor.data_type, tensor.dims, raw.tobytes()) if packed else raw.view(numpy_dtype)
        return to_torch(array, TORCH[dtype]).reshape(constant.shape)

    def _raw(self, constant: WeightReference) -> tuple[onnx.TensorProto, np.ndarray]:
        """The file's tensor and its bytes, those outside the file mapped."""
        tensor = self.tensors.get(constant.name)
        if tensor is None:
            raise UserError(
                self.model,
                f"the {constant.dtype} constant {constant.name} of the parsed network is not in the file",
                "store it as an initializer",
            )
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            data = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
            return tensor, np.frombuffer(bytearray(data), np.uint8)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        offset, path = int(entries.get("offset", 0)), self.root / entries["location"]
        length = int(entries.get("length", 0)) or path.stat().st_size - offset
        return tensor, np.memmap(path, np.uint8, "c", offset, (length,))  # copy on write: torch wants writable memory


def unpack(packed: Packed) -> np.ndarray:
    return _unpacked(dtypes.BY_TENSORRT[packed.dtype].onnx, packed.shape, packed.data)


def _unpacked(data_type: int, shape, data: bytes) -> np.ndarray:
    array = onnx.numpy_helper.to_array(onnx.TensorProto(data_type=data_type, dims=shape, raw_data=data))
    return array.copy()  # torch wants memory that it could write


def _constants(graph: onnx.GraphProto):
    """Initializers and outputs of Constant nodes, those of subgraphs too."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _constants(attribute.g)

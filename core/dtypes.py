"""The one table of dtypes: what ONNX, numpy, torch, onnxruntime, TensorRT and safetensors call each, and how large it is.

torch and ml_dtypes are imported only when something of theirs is asked for, so that a stage's --help stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from onnx import TensorProto

if TYPE_CHECKING:
    import numpy as np
    import torch as torch_module


@dataclass(frozen=True)
class Dtype:
    """Names are None where a library has none. `torch`: what torch computes with; it has no dtype of 4 bits, so INT4 travels
    as int8 and FP4 (e2m1) as float16, which holds its values exactly: `exact` is false there."""

    onnx: int  # onnx.TensorProto type
    numpy: str  # numpy's name, or that of ml_dtypes, with which onnx extends it
    bits: int  # an element, as stored
    torch: str | None = None
    ort: str | None = None  # within onnxruntime's "tensor(...)"
    tensorrt: str | None = None  # trt.DataType
    safetensors: str | None = None
    exact: bool = True

    @property
    def bytes(self) -> float:
        """Of an element as stored: 0.5 for 4 bits."""
        return self.bits / 8


TABLE = (
    Dtype(TensorProto.FLOAT, "float32", 32, "float32", "float", "FLOAT", "F32"),
    Dtype(TensorProto.FLOAT16, "float16", 16, "float16", "float16", "HALF", "F16"),
    Dtype(TensorProto.BFLOAT16, "bfloat16", 16, "bfloat16", "bfloat16", "BF16", "BF16"),
    Dtype(TensorProto.DOUBLE, "float64", 64, "float64", "double", None, "F64"),
    Dtype(TensorProto.INT64, "int64", 64, "int64", "int64", "INT64", "I64"),
    Dtype(TensorProto.INT32, "int32", 32, "int32", "int32", "INT32", "I32"),
    Dtype(TensorProto.INT16, "int16", 16, "int16", "int16", None, "I16"),
    Dtype(TensorProto.INT8, "int8", 8, "int8", "int8", "INT8", "I8"),
    Dtype(TensorProto.UINT64, "uint64", 64, "uint64", "uint64", None, "U64"),
    Dtype(TensorProto.UINT32, "uint32", 32, "uint32", "uint32", None, "U32"),
    Dtype(TensorProto.UINT16, "uint16", 16, "uint16", "uint16", None, "U16"),
    Dtype(TensorProto.UINT8, "uint8", 8, "uint8", "uint8", "UINT8", "U8"),
    Dtype(TensorProto.BOOL, "bool", 8, "bool", "bool", "BOOL", "BOOL"),
    Dtype(TensorProto.FLOAT8E4M3FN, "float8_e4m3fn", 8, "float8_e4m3fn", "float8e4m3fn", "FP8", "F8_E4M3"),
    Dtype(TensorProto.FLOAT8E8M0, "float8_e8m0fnu", 8, "float8_e8m0fnu", None, "E8M0"),
    Dtype(TensorProto.INT4, "int4", 4, "int8", "int4", "INT4", exact=False),
    Dtype(TensorProto.UINT4, "uint4", 4, "uint8", "uint4", exact=False),
    Dtype(TensorProto.FLOAT4E2M1, "float4_e2m1fn", 4, "float16", None, "FP4", exact=False),
    Dtype(TensorProto.INT2, "int2", 2),
    Dtype(TensorProto.UINT2, "uint2", 2),
)

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)  # what models compute in
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FOUR_BITS = tuple(each.onnx for each in TABLE if each.bits == 4)
FLOAT_NAMES = tuple(each.numpy for each in TABLE if each.onnx in FLOATS)

BY_ONNX = {each.onnx: each for each in TABLE}
BY_NUMPY = {each.numpy: each for each in TABLE}
BY_ORT = {f"tensor({each.ort})": each for each in TABLE if each.ort}
BY_TENSORRT = {each.tensorrt: each for each in TABLE if each.tensorrt}
BY_SAFETENSORS = {each.safetensors: each for each in TABLE if each.safetensors}


def of_torch(dtype: torch_module.dtype) -> Dtype:
    """Raises KeyError for one that ONNX lacks."""
    return _by_torch()[str(dtype).removeprefix("torch.")]


def torch_dtype(dtype: Dtype | int) -> torch_module.dtype:
    """What torch holds values of it in; `dtype`: a Dtype, or an onnx.TensorProto type. Raises KeyError."""
    import torch

    known = dtype if isinstance(dtype, Dtype) else BY_ONNX[dtype]
    if known.torch is None:
        raise KeyError(known.numpy)
    return getattr(torch, known.torch)


def run_as(onnx_type: int) -> np.dtype:
    """What onnxruntime's CPU, which has no bfloat16 arithmetic, takes values of this onnx.TensorProto type in: numpy's own
    dtype of it, and float32 for bfloat16."""
    import numpy as np
    import onnx

    return np.dtype(np.float32) if onnx_type == TensorProto.BFLOAT16 else onnx.helper.tensor_dtype_to_np_dtype(onnx_type)


@cache
def _by_torch() -> dict[str, Dtype]:
    return {each.torch: each for each in TABLE if each.torch and each.exact}

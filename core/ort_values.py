"""numpy arrays as onnxruntime's values and back, fp8 among them, of which onnxruntime takes no arrays."""

import ctypes

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import TensorProto


def to_ort(array: np.ndarray) -> ort.OrtValue:
    """onnxruntime takes no arrays of fp8, but their bytes."""
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), TensorProto.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def from_ort(value: ort.OrtValue) -> np.ndarray:
    if value.element_type() != TensorProto.FLOAT8E4M3FN:
        return value.numpy()
    data = np.ctypeslib.as_array((ctypes.c_uint8 * value.tensor_size_in_bytes()).from_address(value.data_ptr()))
    return data.copy().view(ml_dtypes.float8_e4m3fn).reshape(value.shape())

"""The table of dtypes agrees with the libraries whose names it holds."""

import subprocess
import sys

import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx as trt
import torch
from onnx import TensorProto, helper
from safetensors.torch import _TYPES

from suture.core import child, dtypes


@pytest.mark.parametrize("dtype", dtypes.TABLE, ids=lambda dtype: dtype.numpy)
def test_a_row_says_what_the_libraries_say(dtype):
    numpy = helper.tensor_dtype_to_np_dtype(dtype.onnx)
    assert numpy.name == dtype.numpy
    assert numpy.itemsize == max(dtype.bytes, 1)  # ml_dtypes gives an element of 4 bits a byte
    if dtype.torch:
        held = dtypes.torch_dtype(dtype.onnx)
        assert not dtype.exact or (held.itemsize * 8 == dtype.bits and dtypes.of_torch(held) is dtype)
    if dtype.safetensors:
        assert _TYPES[dtype.safetensors] == dtypes.torch_dtype(dtype)
    if dtype.tensorrt:
        size = trt.DataType.__members__[dtype.tensorrt].itemsize
        assert size in (dtype.bytes, None)  # TensorRT gives none for E8M0


@pytest.mark.parametrize("dtype", [each for each in dtypes.TABLE if each.ort and each.bits >= 8], ids=lambda each: each.numpy)
def test_onnxruntime_calls_it_so(dtype):
    values = [helper.make_tensor_value_info(name, dtype.onnx, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (given,) = ort.InferenceSession(model.SerializeToString()).get_inputs()
    assert dtypes.BY_ORT[given.type] is dtype


def test_bfloat16_runs_as_float32_and_others_as_they_are():
    assert dtypes.run_as(TensorProto.BFLOAT16).name == "float32"
    assert dtypes.run_as(TensorProto.FLOAT8E4M3FN).name == "float8_e4m3fn"
    assert dtypes.torch_dtype(TensorProto.FLOAT4E2M1) is torch.float16
    with pytest.raises(KeyError):
        dtypes.torch_dtype(onnx.TensorProto.INT2)


def test_the_table_is_read_without_torch():
    code = "import sys, suture.core.dtypes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=child.environment(), check=True)

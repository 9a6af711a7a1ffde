"""Opens graphs in onnxruntime: the one place that sets a session's options, and turns its values into arrays and back."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

CPU = "CPUExecutionProvider"
ROOT_OPTION = "session.model_external_initializers_file_folder_path"
AS_GIVEN = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
AS_WRITTEN = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # above, it quantises the activations of DequantizeLinear + MatMul
FUSED = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


class NotLoaded(Exception):
    """onnxruntime does not take a graph: says why, in onnxruntime's words."""


def new_session(
    model: onnx.ModelProto,
    root: Path | None = None,
    *,
    level: ort.GraphOptimizationLevel = AS_WRITTEN,
    mapped: bool = False,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = (CPU,),
    without: Sequence[str] = (),
    entries: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ort.InferenceSession:
    """A session for a graph whose external weights lie under `root`. `mapped`: weights stay in their files, no kernel has a
    copy in a layout of its own, and memory is given back; slower. `without`: optimisations that are left out. `entries`:
    further entries of the session's configuration. `sizes`: what dimensions of a name are. Raises NotLoaded."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4  # fatal: an error also comes as an exception
    options.enable_mem_reuse = all(node.op_type != "MultiHeadAttention" for node in model.graph.node)  # dies in float16
    if level != FUSED:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others compute between its steps
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if root is not None:
        options.add_session_config_entry(ROOT_OPTION, str(root))
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=list(providers), disabled_optimizers=list(without) or None
        )
    except Exception as error:  # onnxruntime's errors share no public base
        raise NotLoaded(str(error).strip()) from None


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


def run_arrays(session: ort.InferenceSession, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """These outputs, each in memory that is its own or onnxruntime's: of an output that is an input as it came, it gives the
    input's, which may be gone by the time that the output is read."""
    arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
    found = map(from_ort, session.run_with_ort_values(outputs, {name: to_ort(value) for name, value in arrays.items()}))
    return [value.copy() if any(np.may_share_memory(value, each) for each in arrays.values()) else value for value in found]

"""A stand-in for TensorRT's engine: its execution context computes with onnxruntime, in the memory that is bound to it by
address, as TensorRT's does."""

import ctypes

import numpy as np
import onnx
import onnxruntime as ort

NUMPY = {1: np.float32, 7: np.int64}


class FakeEngine:
    """Made from a portable float32 graph, its weights inside."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.contexts = model, []

    def create_execution_context(self):
        self.contexts.append(Context(self.model))
        return self.contexts[-1]


class Context:
    def __init__(self, model: onnx.ModelProto):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.dtypes = {value.name: NUMPY[value.type.tensor_type.elem_type] for value in model.graph.input}
        self.shapes, self.addresses, self.profile = {}, {}, None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        feeds = {name: self._memory(name, self.shapes[name], dtype).copy() for name, dtype in self.dtypes.items()}
        names = [output.name for output in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, feeds)):
            self._memory(name, value.shape, value.dtype)[...] = value
        return True

    def _memory(self, name, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

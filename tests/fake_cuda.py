"""A GPU made of the CPU's memory, and an onnxruntime session on it that binds as a CUDA session does."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import onnxruntime as ort
import torch
from torch.overrides import TorchFunctionMode


class CudaTensor(torch.Tensor):
    """Memory of the CPU that says it is a GPU's."""

    device = torch.device("cuda", 0)


class Factories(TorchFunctionMode):
    """Tensors that torch is asked for on "cuda" are CudaTensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            places = [place for place in (*args[1:], kwargs.get("device")) if isinstance(place, (str, torch.device))]
            if any(torch.device(place).type == "cuda" for place in places):
                return args[0].clone().as_subclass(CudaTensor)
        if torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return function(*args, **kwargs)
        return function(*args, **kwargs | {"device": "cpu"}).as_subclass(CudaTensor)


@contextmanager
def fake_cuda() -> Iterator[None]:
    with Factories(), patch.object(torch.cuda, "synchronize", lambda: None):
        yield


@dataclass
class MemoryInfo:
    name: str


class CudaSession:
    """A CPU session that says it reads its inputs on a GPU, but those named `on_cpu`. With `captured` its first run is a
    CUDA graph: every later one replays it, at the addresses that were bound then."""

    def __init__(self, session: ort.InferenceSession, on_cpu: set[str] = frozenset(), captured: bool = False):
        self.session, self.captured = session, captured
        self.wanted = {each.name: "Cpu" if each.name in on_cpu else "Cuda" for each in session.get_inputs()}
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.replayed: ort.IOBinding | None = None
        self.runs = 0

    def get_input_memory_infos(self) -> list[MemoryInfo]:
        return [MemoryInfo(name) for name in self.wanted.values()]

    def get_output_memory_infos(self) -> list[MemoryInfo]:
        return [MemoryInfo("Cuda") for _ in self.get_outputs()]

    def io_binding(self) -> "CudaBinding":
        return CudaBinding(self)

    def run_with_iobinding(self, binding: "CudaBinding") -> None:
        self.runs += 1
        if self.captured and self.replayed is None:
            self.replayed = binding.real
        self.session.run_with_iobinding(self.replayed or binding.real)


class CudaBinding:
    """IOBinding: an input that is bound on another device than it is wanted on is copied, then and never again."""

    def __init__(self, session: CudaSession):
        self.session, self.real = session, session.session.io_binding()
        self.copies: dict[str, ctypes.Array] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: int, shape: list[int], address: int) -> None:
        if self.session.replayed is self.real:
            return  # a CUDA graph goes on with what it was captured with
        if device != self.session.wanted[name].lower():
            size = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype).tensor_size_in_bytes()
            self.copies[name] = ctypes.create_string_buffer(ctypes.string_at(address, size), size)
            address = ctypes.addressof(self.copies[name])
        self.real.bind_input(name, "cpu", index, dtype, shape, address)

    def bind_output(self, name: str, device: str, index: int, dtype: int, shape: list[int], address: int) -> None:
        self.real.bind_output(name, "cpu", index, dtype, shape, address)

"""A batch of sequences in onnxruntime: inputs, logits and caches bound to memory that stays where it is.

A static cache is one buffer for both its ends, so a step copies none of it. A captured CUDA graph remembers addresses,
which is why a decoding step's buffers are kept from step to step.
"""

import functools
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import torch

from suture.core.dtypes import BY_ORT, of_torch, torch_dtype
from suture.core.layerwise import LayerwiseSession
from suture.core.signature import Signature

Feed = np.ndarray | torch.Tensor  # an input's values, on the host or where they were computed


def as_tensor(value: Feed) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))


class Binding:
    """Inputs and outputs of a session, bound to memory that stays where it is.

    onnxruntime decides where a session reads each input: on CUDA, what arithmetic on shapes takes is wanted on the CPU.
    IOBinding copies an input that lies elsewhere when it is bound, and what is written to it later is never seen. So an
    input that a step writes is made on `device(name)`, and whatever lies elsewhere is bound again before each run. (That
    moves the copy: a graph whose steps are captured must find its inputs where it reads them.) An output that lies
    elsewhere needs nothing: onnxruntime copies it after each run.

    A session that computes on the stream that torch is computing on, and reads and writes nothing elsewhere, may be `ordered`:
    a run is queued there behind what was queued before, and neither waits on the host nor is waited for.
    """

    def __init__(self, session: ort.InferenceSession):
        self.session, self.binding = session, session.io_binding()
        read = zip(session.get_inputs(), session.get_input_memory_infos())
        self.read_on = {value.name: info.name.lower() for value, info in read}  # "cpu", "cuda", ...
        self.memory: dict[str, torch.Tensor] = {}  # lives as long as its address is known to the session
        self.elsewhere: dict[str, torch.Tensor] = {}
        self.on_gpu = self.ordered = False

    def takes(self, name: str) -> bool:
        return name in self.read_on

    def device(self, name: str) -> str:
        """Where memory for an input is best: "cuda" or "cpu"."""
        return "cuda" if self.read_on[name] == "cuda" else "cpu"

    def input(self, name: str, tensor: torch.Tensor) -> None:
        self._bind(self.binding.bind_input, name, tensor)
        if tensor.device.type != self.read_on[name]:
            self.elsewhere[name] = tensor

    def output(self, name: str, tensor: torch.Tensor) -> None:
        self._bind(self.binding.bind_output, name, tensor)

    def run(self) -> None:
        """Computes with what the inputs' memory holds now."""
        if self.ordered:
            self.session.run_with_iobinding(self.binding, _queued())
            return
        if self.on_gpu:
            torch.cuda.synchronize()  # what torch wrote must be there before onnxruntime's own stream reads it
        for name, tensor in self.elsewhere.items():
            self._bind(self.binding.bind_input, name, tensor)
        self.session.run_with_iobinding(self.binding)

    def _bind(self, bind: Callable, name: str, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        self.memory[name] = tensor if tensor.numel() else tensor.new_empty(1)  # onnxruntime wants an address of nothing, too
        self.on_gpu |= tensor.device.type == "cuda"
        address = self.memory[name].data_ptr()
        bind(name, tensor.device.type, tensor.device.index or 0, of_torch(tensor.dtype).onnx, list(tensor.shape), address)


@functools.cache
def _queued() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


class BoundSession:
    """`batch` sequences with caches of their own. `decoding` is the session for steps of one token for each of them: the
    same one, unless another of the same graph is put there, which may take fewer inputs."""

    def __init__(self, session: ort.InferenceSession, signature: Signature, batch: int, device: str = "cpu"):
        self.session = self.decoding = session
        self.signature, self.batch, self.device = signature, batch, device
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.logits = next(value for value in session.get_outputs() if value.name == signature.logits)
        self.caches = {cache.past: self._empty(cache.past) for cache in signature.caches}
        constant = (*(cache.past for cache in signature.encoder_caches), *signature.layout)
        self.crossed = {name: self._empty(name) for name in constant}
        self.steps: dict[tuple[int, int, int], BoundStep] = {}  # by width and rows

    @property
    def all_at_once(self) -> bool:
        """Whether decoding has a session of its own, whose steps are captured for all rows and for no other number."""
        return self.decoding is not self.session

    def advance(self, feeds: dict[str, Feed], rows: slice = slice(None)) -> torch.Tensor:
        """One step of some adjacent sequences, to which `feeds` (inputs by name, without caches) belong. Returns logits
        [B,S,vocab], on the device, which hold until the next step; the caches hold the step's tokens afterwards."""
        key = feeds[self.signature.tokens].shape[1], *rows.indices(self.batch)[:2]
        if key not in self.steps:
            for other in [other for other in self.steps if other[0] > 1]:
                del self.steps[other]  # lengths of prompts hardly recur, and their logits are large
            self.steps[key] = BoundStep(self, feeds, key[0], rows)
        return self.steps[key].run(feeds)

    def _empty(self, name: str) -> torch.Tensor:
        declared = self.inputs[name]
        return torch.zeros((self.batch, *declared.shape[1:]), dtype=torch_dtype(BY_ORT[declared.type]), device=self.device)


class BoundStep:
    """A step of one width for some rows."""

    def __init__(self, bound: BoundSession, feeds: dict[str, Feed], width: int, rows: slice):
        decodes = width == 1 and len(range(*rows.indices(bound.batch))) == bound.batch
        self.binding = Binding(bound.decoding if decodes else bound.session)
        self.buffers = {}
        for name in filter(self.binding.takes, feeds):
            dtype, device = torch_dtype(BY_ORT[bound.inputs[name].type]), self.binding.device(name)
            self.buffers[name] = torch.empty(feeds[name].shape, dtype=dtype, device=device)
            self.binding.input(name, self.buffers[name])
        for cache in bound.signature.caches:
            buffer = bound.caches[cache.past][rows]
            self.binding.input(cache.past, buffer)
            self.binding.output(cache.present, buffer)
        for name, buffer in bound.crossed.items():
            self.binding.input(name, buffer[rows])
        batch = len(feeds[bound.signature.tokens])
        places = 1 if bound.signature.last_only else width
        shape = (batch, places, bound.logits.shape[-1])
        self.logits = torch.empty(shape, dtype=torch_dtype(BY_ORT[bound.logits.type]), device=bound.device)
        self.binding.output(bound.signature.logits, self.logits)

    def run(self, feeds: dict[str, Feed]) -> torch.Tensor:
        for name, buffer in self.buffers.items():
            buffer.copy_(as_tensor(feeds[name]), non_blocking=True)
        self.binding.run()
        return self.logits


class CopyingSession:
    """The same for a session to which no memory can be bound: a step's caches come out of it anew, and are copied."""

    all_at_once = False

    def __init__(self, session: LayerwiseSession, signature: Signature, shapes: list[tuple[int, ...]], dtype: type):
        self.session, self.signature = session, signature
        self.caches = {cache.past: torch.from_numpy(np.zeros(shape, dtype)) for cache, shape in zip(signature.caches, shapes)}
        batch, sizes = shapes[0][0], {value.name: value.shape for value in session.get_inputs()}
        self.crossed = {
            cache.past: torch.from_numpy(np.zeros((batch, *sizes[cache.past][1:]), dtype)) for cache in signature.encoder_caches
        }
        self.crossed |= {name: torch.zeros((batch, *sizes[name][1:]), dtype=torch.int64) for name in signature.layout}

    def advance(self, feeds: dict[str, Feed], rows: slice = slice(None)) -> torch.Tensor:
        given = {name: as_tensor(value).numpy() for name, value in feeds.items()}
        pasts = {name: cache[rows].numpy() for name, cache in (self.caches | self.crossed).items()}
        presents = [cache.present for cache in self.signature.caches]
        logits, *written = self.session.run([self.signature.logits, *presents], given | pasts)
        for cache, present in zip(self.signature.caches, written):
            self.caches[cache.past][rows] = torch.from_numpy(present)
        return torch.from_numpy(logits)

"""Runs an engine that build/ wrote, on a GPU: weights and caches stay there, a cache is one buffer for both its ends.

Needs numpy, torch and TensorRT and nothing of Suture, because `python -m validate --bundle` sends this file along. What
it knows of an engine is engine.json: names, shapes, roles, profiles, and where weights lie that are the engine's inputs.

A decoding step (one token a row) is captured as a CUDA graph at its second call and replayed from then on.
"""

import contextlib
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

MODULES = {"standard": "tensorrt", "rtx": "tensorrt_rtx"}
RUNTIME_CACHE = "runtime.cache"  # kernels that TensorRT-RTX compiled for this GPU


def why_not(description: dict) -> str | None:
    """Why the engine that `description` (engine.json) tells of cannot be run here; None if it can."""
    if not all(tensor["same_buffer_as"] for tensor in _by_role(description, "cache").values()):
        return "its caches grow, and the engine's runner binds caches of fixed capacity in place"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if capability not in description["compute_capabilities"]:
        return f"this GPU has compute capability {capability}, and the engine is for {', '.join(description['compute_capabilities'])}"
    flavour, version = description["tensorrt"]["flavour"], description["tensorrt"]["version"]
    try:
        found = importlib.import_module(MODULES[flavour]).__version__
    except (ImportError, OSError):
        return f"{MODULES[flavour]} cannot be imported"
    if found != version:
        return f"it was built with {MODULES[flavour]} {version}, and {found} is installed"
    return None


class Engine:
    """An engine on the GPU. Raises RuntimeError where TensorRT refuses it."""

    def __init__(self, path: Path, description: dict, weights_root: Path, engine=None, device: str = "cuda"):
        """`engine`: a deserialised one, if it is not to be read from the file `path`."""
        self.description, self.device = description, device
        self.cache_file = path.parent / RUNTIME_CACHE
        self.trt = importlib.import_module(MODULES[description["tensorrt"]["flavour"]])
        self.engine = engine or _deserialise(self.trt, path)
        self.weights = {
            weight["name"]: read_weight(weight, weights_root).to(device) for weight in description["weights"]["inputs"]
        }
        self.contexts: dict[int, object] = {}
        self.runtime_cache = None

    def context(self, profile: int, stream: int):
        """One for each profile, so that a captured graph's memory and shapes stay as they were."""
        if profile not in self.contexts:
            made = self._create_context()
            if made is None:
                raise RuntimeError("TensorRT cannot make an execution context: the GPU's memory may be too small")
            made.set_optimization_profile_async(profile, stream)
            for name, weight in self.weights.items():
                made.set_tensor_address(name, weight.data_ptr())
            self.contexts[profile] = made
        return self.contexts[profile]

    def save_runtime_cache(self) -> None:
        if self.runtime_cache is not None:
            self.cache_file.write_bytes(bytes(self.runtime_cache.serialize()))

    def _create_context(self):
        if not hasattr(self.engine, "create_runtime_config") or not hasattr(self.trt, "IRuntimeCache"):
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        if self.runtime_cache is None:
            self.runtime_cache = config.create_runtime_cache()
            if self.cache_file.is_file():
                self.runtime_cache.deserialize(self.cache_file.read_bytes())
        config.set_runtime_cache(self.runtime_cache)
        return self.engine.create_execution_context(config)


class EngineSession:
    """A batch of `batch` sequences with caches of their own, bound in place. Steps are queued on a stream of its own, before which
    comes what torch's stream has to do, and after which what it is given next: nothing waits for a step."""

    all_at_once = False  # a step of each number of rows is captured

    def __init__(self, engine: Engine, batch: int, graphs: bool = True):
        self.engine, self.batch = engine, batch
        self.on_gpu = engine.device != "cpu"
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        self.graphs = graphs and self.on_gpu
        self.caches = self._empty("cache")
        self.crossed = self._empty("encoder_cache") | self._empty("layout")
        self.steps: dict[tuple[int, int, int], EngineStep] = {}  # by width and rows

    def _empty(self, role: str) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(
                (self.batch, *tensor["shape"][1:]), dtype=getattr(torch, tensor["dtype"]), device=self.engine.device
            )
            for name, tensor in _by_role(self.engine.description, role).items()
            if tensor["is_input"]
        }

    def fill(self, values: dict[str, np.ndarray]) -> None:
        """Writes whole caches, by the name of the input."""
        for name, value in values.items():
            self.caches[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """One step of all sequences: the engine's inputs by name, without caches and weights. Returns the logits, float16
        or float32; the caches hold the step's tokens afterwards. Raises ValueError where no profile allows the shapes."""
        return to_numpy(self.advance(feeds))

    def advance(self, feeds: dict[str, np.ndarray], rows: slice = slice(None)) -> torch.Tensor:
        """The same for some adjacent sequences, to which `feeds` belong. The logits hold until the next step."""
        tokens = next(iter(_by_role(self.engine.description, "tokens")))
        key = feeds[tokens].shape[1], *rows.indices(self.batch)[:2]
        if key not in self.steps:
            for other in [other for other in self.steps if other[0] > 1]:
                del self.steps[other]  # lengths of prompts hardly recur, and their logits are large
            self.steps[key] = EngineStep(self, {name: value.shape for name, value in feeds.items()}, key[0], rows)
        if not self.on_gpu:
            return self.steps[key].run(feeds)
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            logits = self.steps[key].run(feeds)
        outside.wait_stream(self.stream)
        return logits


class EngineStep:
    """Buffers for the inputs and logits of steps of one width and some rows, which keep their addresses from step to step."""

    def __init__(self, session: EngineSession, shapes: dict[str, tuple[int, ...]], width: int, rows: slice = slice(None)):
        description, device = session.engine.description, session.engine.device
        self.session, self.width = session, width
        self.caches = {name: cache[rows] for name, cache in (session.caches | session.crossed).items()}
        self.profile = choose_profile(description, {**shapes, **{name: tuple(t.shape) for name, t in self.caches.items()}})
        inputs = {tensor["name"]: tensor for tensor in description["inputs"]}
        self.buffers = {
            name: torch.empty(shape, dtype=getattr(torch, inputs[name]["dtype"]), device=device)
            for name, shape in shapes.items()
        }
        ((self.logits_name, logits),) = _by_role(description, "logits").items()
        places = 1 if logits["shape"][1] == 1 else width  # of each row's last token alone, or of all
        shape = (*next(iter(shapes.values()))[:1], places, logits["shape"][-1])
        self.logits = torch.empty(shape, dtype=getattr(torch, logits["dtype"]), device=device)
        self.runs, self.graph = 0, None

    def run(self, feeds: dict[str, np.ndarray | torch.Tensor]) -> torch.Tensor:
        for name, buffer in self.buffers.items():
            value = (
                feeds[name] if isinstance(feeds[name], torch.Tensor) else torch.from_numpy(np.ascontiguousarray(feeds[name]))
            )
            buffer.copy_(value)
        stream = self.session.stream.cuda_stream if self.session.on_gpu else 0
        if self.graph is None:
            context = self._bound_context(stream)
            if self.runs and self.width == 1 and self.session.graphs and _capturable(context, stream):
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.session.stream):  # records, and does not run
                    _execute(context, stream)
            else:
                _execute(context, stream)
        if self.graph is not None:
            self.graph.replay()
        self.runs += 1
        return self.logits

    def _bound_context(self, stream: int):
        """The profile's context with every tensor bound. A cache's two ends have one address."""
        context = self.session.engine.context(self.profile, stream)
        for name, buffer in (*self.buffers.items(), *self.caches.items()):
            context.set_input_shape(name, tuple(buffer.shape))
            context.set_tensor_address(name, buffer.data_ptr())
        for name, tensor in _by_role(self.session.engine.description, "cache").items():
            if not tensor["is_input"]:
                context.set_tensor_address(name, self.caches[tensor["same_buffer_as"]].data_ptr())
        context.set_tensor_address(self.logits_name, self.logits.data_ptr())
        return context


def run_once(engine: Engine, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of an engine that is not a decoder, by name; bfloat16 as float32. Raises ValueError where no profile allows
    the inputs' shapes."""
    description = engine.description
    profile = choose_profile(description, {name: value.shape for name, value in inputs.items()})
    stream = torch.cuda.Stream() if engine.device != "cpu" else None
    context = engine.context(profile, stream.cuda_stream if stream else 0)
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        buffers = {}
        for tensor in description["inputs"]:
            if tensor["role"] != "weight":
                value = torch.from_numpy(np.ascontiguousarray(inputs[tensor["name"]]))
                buffers[tensor["name"]] = value.to(engine.device, getattr(torch, tensor["dtype"]))
                context.set_input_shape(tensor["name"], tuple(value.shape))
        for tensor in description["outputs"]:
            shape, dtype = tuple(context.get_tensor_shape(tensor["name"])), getattr(torch, tensor["dtype"])
            buffers[tensor["name"]] = torch.empty(shape, dtype=dtype, device=engine.device)
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        _execute(context, stream.cuda_stream if stream else 0)
    if stream:
        stream.synchronize()
    return {tensor["name"]: to_numpy(buffers[tensor["name"]]) for tensor in description["outputs"]}


def choose_profile(description: dict, shapes: dict[str, tuple[int, ...]]) -> int:
    """The first profile that allows the inputs' shapes: decode comes before prompt. Raises ValueError where none does."""
    for index, profile in enumerate(description["profiles"]):
        if all(
            all(low <= size <= high for low, size, high in zip(smallest, shapes[name], largest, strict=True))
            for name, (smallest, _, largest) in profile["shapes"].items()
        ):
            return index
    raise ValueError(f"no profile of the engine allows {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")


def takes(description: dict, batch: int, width: int) -> bool:
    """Whether a step of `width` tokens for each of `batch` sequences is in some profile."""
    tokens = next(iter(_by_role(description, "tokens")))
    return any(
        tokens not in profile["shapes"]
        or all(
            low <= size <= high
            for low, size, high in zip(profile["shapes"][tokens][0], (batch, width), profile["shapes"][tokens][2])
        )
        for profile in description["profiles"]
    )


def read_weight(weight: dict, root: Path) -> torch.Tensor:
    """A weight that is an input of the engine, from its place in a checkpoint's file: engine.json's weights.inputs."""
    mapped = np.memmap(root / weight["file"], np.uint8, "r", offset=weight["offset"], shape=(weight["bytes"],))
    tensor = torch.from_numpy(np.array(mapped)).view(getattr(torch, weight["dtype"]))
    if tensor.numel() != math.prod(weight["shape"]):
        raise ValueError(f"weight {weight['name']}: {tensor.numel()} values in {weight['file']}, not {weight['shape']}")
    return tensor.reshape(weight["shape"])


def read_description(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy; bfloat16 and fp8, which numpy has not, as float32."""
    tensor = tensor.detach().to("cpu", copy=True)
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor).numpy()


def _by_role(description: dict, role: str) -> dict[str, dict]:
    """Inputs, then outputs, that have a role, by name; each says `is_input`, and a cache the other end of its buffer."""
    return {
        tensor["name"]: {"same_buffer_as": None, **tensor, "is_input": is_input}
        for is_input, tensors in ((True, description["inputs"]), (False, description["outputs"]))
        for tensor in tensors
        if tensor["role"] == role
    }


def _deserialise(trt: ModuleType, path: Path):
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError(f"{path}: TensorRT cannot read this engine here")
    return engine


def _capturable(context, stream: int) -> bool:
    """TensorRT-RTX compiles kernels at first use, which cannot be recorded; it says when that is over."""
    return context.is_stream_capturable(stream) if hasattr(context, "is_stream_capturable") else True


def _execute(context, stream: int) -> None:
    if not context.execute_async_v3(stream):
        raise RuntimeError("TensorRT could not run a step; its log says why")

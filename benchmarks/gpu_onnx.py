"""Our graphs in onnxruntime, inputs and outputs bound to device memory, the static cache bound in place."""

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor

from benchmarks.gpu_torch import Caches
from suture.core.dtypes import torch_dtype
from suture.core.signature import Signature, find_signature, ntk_alpha
from suture.core.weights import weights_root
from suture.runtime.graphs import cuda_session, fast_session
from suture.runtime.io_binding import Binding


class OnnxRun:
    """A graph, growing or static, as the stages wrote it.

    With `cuda_graph` there is a session for each batch and step length, which are fixed in it (onnxruntime can then fold
    all arithmetic on shapes, as CUDA graphs need); without, one session serves all.
    """

    def __init__(self, model: Path, device: str, cuda_graph: bool, root: Path | None):
        self.model, self.device, self.cuda_graph = model, device, cuda_graph
        self.root = root or weights_root(model)
        self.proto = onnx.load(model, load_external_data=False)
        self.signature: Signature = find_signature(self.proto, model)
        self.vocab = next(v for v in self.proto.graph.output if v.name == "logits").type.tensor_type.shape.dim[-1].dim_value
        self.dtype = torch_dtype(self.signature.dtype)
        self.session, self.sizes = None, None
        self.buffers: dict[str, Tensor] = {}

    def prompt(self, tokens: Tensor) -> Callable[[], Tensor]:
        return self._step(tokens, context=0, caches=None)

    def decode(self, tokens: Tensor, caches: Caches | int) -> Callable[[], Tensor]:
        """`caches` may be the length of a context whose content does not matter."""
        context = caches if isinstance(caches, int) else caches[0][0].shape[2]
        return self._step(tokens, context, None if isinstance(caches, int) else caches)

    def close(self) -> None:
        self.session, self.sizes = None, None
        self.buffers.clear()

    def _step(self, tokens: Tensor, context: int, caches: Caches | None) -> Callable[[], Tensor]:
        batch, steps = tokens.shape
        self._open(batch, steps)
        positions = (context + torch.arange(steps, device=self.device)).expand(batch, steps)
        inputs = {self.signature.tokens: tokens, self.signature.positions: positions}
        if self.signature.ntk_alpha:
            alpha = ntk_alpha(context + steps, self.signature.ntk_trained_length)
            inputs[self.signature.ntk_alpha] = torch.full((batch,), alpha, device=self.device)
        if self.signature.last_only:
            inputs[self.signature.sequence_lengths] = torch.full((batch,), steps, device=self.device)
        if self.signature.static:
            inputs[self.signature.write_indices] = torch.full((batch,), context, device=self.device)
        else:
            inputs[self.signature.mask] = torch.ones(batch, context + steps, dtype=torch.int64, device=self.device)

        binding = Binding(self.session)
        for name, tensor in inputs.items():
            if binding.takes(name):
                binding.input(name, self._buffer(name, tensor.shape, tensor.dtype, binding.device(name)).copy_(tensor))
        logits = self._buffer("logits", (batch, 1 if self.signature.last_only else steps, self.vocab), self.dtype)
        binding.output("logits", logits)
        self._bind_caches(binding, batch, steps, context, caches)

        def step() -> Tensor:
            binding.run()
            return logits

        return step

    def _bind_caches(self, binding: Binding, batch: int, steps: int, context: int, caches: Caches | None) -> None:
        heads, width = self.signature.kv_heads, self.signature.head_dim
        static = self.signature.static
        for cache in self.signature.caches:
            slots = self.signature.capacity if static else context
            past = self._buffer(cache.past, (batch, heads, slots, width), self.dtype)
            if caches is not None:
                key, value = caches[cache.layer]
                past[:, :, :context].copy_(key if cache.role == "key" else value)
            elif not static or context:
                past.normal_()
            binding.input(cache.past, past)
            if static:
                binding.output(cache.present, past)
            else:
                grown = self._buffer(cache.present, (batch, heads, context + steps, width), self.dtype)
                binding.output(cache.present, grown)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str | None = None) -> Tensor:
        """Memory that stays where it is while its size does: a captured CUDA graph remembers addresses."""
        known = self.buffers.get(name)
        if known is None or known.shape != torch.Size(shape):
            self.buffers.pop(name, None)
            self.buffers[name] = torch.zeros(shape, dtype=dtype, device=device or self.device)
        return self.buffers[name]

    def _open(self, batch: int, steps: int) -> None:
        sizes = (batch, steps) if self.cuda_graph else ()
        if self.sizes == sizes:
            return
        self.close()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        if self.device == "cuda" and self.cuda_graph:
            self.session = cuda_session(self.proto, self.root, str(self.model), captured=sizes)
        else:
            self.session = fast_session(self.proto, self.root, str(self.model), self.device)
        if self.device == "cuda" and "CUDAExecutionProvider" not in self.session.get_providers():
            raise RuntimeError("onnxruntime has no CUDA provider here")
        self.sizes = sizes

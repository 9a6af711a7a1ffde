"""A checkpoint's model in PyTorch, stepped like a growing graph: what the exported graph must agree with."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

from suture.core.cpm_inputs import LAYOUT, made_up
from suture.core.dtypes import run_as, torch_dtype
from suture.core.layerwise import LARGE
from suture.core.step_inputs import Embed, in_rows
from suture.models.architectures import load_model, meta_model, open_checkpoint
from suture.models.checkpoint import Checkpoint
from suture.runtime.decoders import Decoder, GrowingDecoder, encoder_caches
from suture.runtime.seen import placed_by


@dataclass(frozen=True)
class TorchReference:
    """The model in float32, its weights rounded to `dtype`."""

    name: str
    dtype: int  # onnx.TensorProto type
    module: torch.nn.Module = field(repr=False)
    embed: Embed | None = field(repr=False, default=None)  # of tokens and pictures; without one, tokens are the module's own

    capacity = None
    last_only = False

    @property
    def vocab(self) -> int:
        return self.module.dimensions.vocab

    @property
    def bidirectional(self) -> bool:
        return self.module.dimensions.bidirectional

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.module.dimensions.prefix

    @property
    def trained_length(self) -> int | None:
        return self.module.dimensions.ntk_trained_length

    @property
    def cache_names(self) -> list[tuple[int, str]]:
        side = "" if self.module.dimensions.encoder_slots is None else "decoder."
        return [(layer, side + role) for layer in range(self.module.dimensions.layers) for role in ("key", "value")]

    def decoder(self, batch: int) -> Decoder:
        of = self.module.dimensions
        empty = [np.zeros((batch, of.kv_heads, 0, of.head_dim), np.float32) for _ in self.cache_names]
        return GrowingDecoder(self._forward, empty, placed_by(self.embed, of.position_rows, batch))

    @property
    def _cache_dtype(self) -> np.dtype:
        """That of the caches that the graph is given: what it reads of an encoder is rounded alike."""
        return run_as(self.dtype)

    @torch.inference_mode()
    def _forward(self, tokens, positions, mask, pasts, alpha):
        tokens = tokens if self.embed is None else self.embed(tokens)
        positions = in_rows(self.module.dimensions.position_rows, positions)
        given = (torch.from_numpy(np.ascontiguousarray(array)) for array in (tokens, positions, mask))
        alpha = [torch.from_numpy(alpha)] if self.trained_length is not None else []
        of = self.module.dimensions
        slots = [] if of.encoder_slots is None else [(of.kv_heads, of.encoder_slots, of.head_dim)] * len(pasts)
        cross = encoder_caches(slots, len(tokens), self._cache_dtype)
        past = [torch.from_numpy(each.astype(np.float32)) for each in (*pasts, *cross)]
        layout = made_up(LAYOUT if of.segmented else (), len(tokens))
        logits, presents = self.module(*given, past, *alpha, *map(torch.from_numpy, layout.values()))
        return logits.numpy(), [present.numpy() for present in presents]


def open_reference(checkpoint: Path, weights: int = TensorProto.FLOAT, lora: Path | None = None) -> TorchReference:
    """The checkpoint's model, with the adapter `lora` if there is one, its weights rounded to the onnx.TensorProto type
    `weights`, as a graph of that type has them, so that what differs is the graph."""
    name = f"PyTorch, {str(torch_dtype(weights)).removeprefix('torch.')} weights"
    return TorchReference(name, weights, load_reference(open_checkpoint(checkpoint, lora), weights))


def load_reference(checkpoint: Checkpoint, weights: int) -> nn.Module:
    """The checkpoint's model in float32, weights rounded to the onnx.TensorProto type `weights`. Of a large one, each
    module's are read when it is called."""
    dtype = torch_dtype(weights)
    if sum(entry.length for entry in checkpoint.tensors.values()) >= LARGE:
        return _reading_as_it_goes(checkpoint, dtype)
    return load_model(checkpoint, dtype).float()


def _reading_as_it_goes(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The checkpoint's model without weights: each module reads its own when it is called, and drops them after. Only
    embeddings that are the head, too, stay: what multiplies with them is not a module. So do those of a model that is no decoder."""
    model = meta_model(checkpoint)
    vocab = model.dimensions.vocab if hasattr(model, "dimensions") else None
    tied = not any(isinstance(module, nn.Linear) and module.out_features == vocab for module in model.modules())
    for path, module in model.named_modules():
        names = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if tied and isinstance(module, nn.Embedding) and vocab in (None, module.num_embeddings):
            module.weight = nn.Parameter(checkpoint.load_float32(names["weight"], rounded_to=dtype))
        elif names:
            _read_when_called(module, names, checkpoint, dtype)
    return model.requires_grad_(False)


def _read_when_called(module: nn.Module, names: dict[str, str], checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    absent = {name: getattr(module, name) for name in names}

    def read(*_):
        for name, tensor in names.items():
            weight = checkpoint.load_float32(tensor, rounded_to=dtype)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def drop(*_):
        for name, empty in absent.items():
            setattr(module, name, empty)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(drop)

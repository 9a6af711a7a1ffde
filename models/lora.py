"""A LoRA adapter in peft's layout, merged into a checkpoint's weights when they are read.

    W  →  W + s · B · A        A [r, in], B [out, r], s = lora_alpha / r, or lora_alpha / √r with use_rslora

computed in float32 and rounded once. What an adapter holds whole (modules_to_save, biases) takes the place of the checkpoint's.
(peft's src/peft/tuners/lora/layer.py, get_delta_weight; utils/save_and_load.py for the names.)
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, create_model

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.safetensors_header import TensorEntry, read_header
from suture.core.typed import Strict, read_typed
from suture.models.checkpoint import Checkpoint, JoinedTensor
from suture.models.packed import is_packed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = ".base_layer."  # what a module is called that has factors beside it
PARTS = {  # what stands behind a module's name, by which of the two it is, and whether the product is of an embedding
    ".lora_A.weight": ("A", False), ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True), ".lora_embedding_B": ("B", True),
}  # fmt: skip
REMEDY = "merge it with peft's merge_and_unload, and export that checkpoint"
Rank, Number = Annotated[int, Field(ge=1, le=100_000)], Annotated[float, Field(ge=0, le=1e6)]
AdapterConfig = create_model(
    "AdapterConfig", __base__=Strict, peft_type=(str, ...), r=(Rank, ...), lora_alpha=(Number, ...),
    use_rslora=(bool | None, None), use_dora=(bool | None, None), fan_in_fan_out=(bool | None, None),
    alpha_pattern=(dict[str, Number] | None, None), rank_pattern=(dict[str, Rank] | None, None),
)  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """The two factors of one weight, and what their product is multiplied with."""

    checkpoint: Checkpoint
    name: str
    a: TensorEntry
    b: TensorEntry
    scale: float
    turned: bool  # the weight is [in, out]

    def merged(self) -> torch.Tensor:
        """float32, in the weight's shape."""
        adapter = replace(self.checkpoint, tensors={"A": self.a, "B": self.b}, joined={})
        product = adapter.load("B").float() @ adapter.load("A").float()
        return self.checkpoint.load(self.name).float().add_(product.T if self.turned else product, alpha=self.scale)


def with_adapter(checkpoint: Checkpoint, folder: Path, names: Collection[str]) -> Checkpoint:
    """The checkpoint, whose architecture has tensors called `names`, with the adapter in `folder`. Raises UserError for an adapter
    that is no LoRA, or has a tensor that the model has no place for."""
    file, weights = inside(folder, CONFIG), inside(folder, WEIGHTS)
    config = read_typed(file, AdapterConfig, "name a folder in which peft saved a LoRA adapter")
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        kind = "LoRA with magnitudes (use_dora)" if config["peft_type"] == "LORA" else config["peft_type"]
        raise UserError(file, f"describes an adapter that is {kind}, not LoRA alone", REMEDY)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    turned: set[str] = set()
    whole: dict[str, JoinedTensor] = {}
    for name, entry in read_header(weights).items():
        module = name.removeprefix(PREFIX).replace(BASE, ".")
        ending = next((ending for ending in PARTS if module.endswith(ending)), None)
        target = module if ending is None else f"{module.removesuffix(ending)}.weight"
        if target not in names or is_packed(checkpoint, target):
            wrong = "belongs to a weight that is packed in few bits" if target in names else "has no place in the model"
            raise UserError(weights, f"{name} {wrong}", REMEDY)
        _check_type(weights, entry)
        if ending is None:
            whole[target] = JoinedTensor(entry.dtype, _stored(checkpoint, target).shape, partial(_whole, checkpoint, entry))
            continue
        side, of_embedding = PARTS[ending]
        pairs.setdefault(target, {})[side] = entry
        if of_embedding or config.get("fan_in_fan_out"):
            turned.add(target)
    if not pairs:
        raise UserError(weights, "has no LoRA factors", "name a folder in which peft saved a LoRA adapter")
    base = replace(checkpoint, joined={**checkpoint.joined, **whole})
    joined = dict(base.joined)
    for name, pair in pairs.items():
        stored = _stored(base, name)
        shape = stored.shape[::-1] if name in turned else stored.shape
        _check_pair(weights, name, pair, shape)
        scale = _scale(config, file, name.removesuffix(".weight"), pair["A"].shape[0])
        made = _Pair(base, name, pair["A"], pair["B"], scale, name in turned)
        joined[name] = JoinedTensor(stored.dtype, stored.shape, made.merged)
    return replace(checkpoint, joined=joined, described=(*checkpoint.described, file, weights))


def _stored(checkpoint: Checkpoint, name: str) -> TensorEntry | JoinedTensor:
    found = checkpoint.stored(name)
    assert found is not None, f"{name} is one of the model's, whose tensors have been checked"
    return found


def _check_type(weights: Path, entry: TensorEntry) -> None:
    if not entry.dtype.startswith(("float", "bfloat")):
        raise UserError(weights, f"{entry.name} is of type {entry.dtype}, not of floating-point numbers", REMEDY)


def _check_pair(weights: Path, name: str, pair: dict[str, TensorEntry], shape: tuple[int, ...]) -> None:
    if set(pair) != {"A", "B"}:
        raise UserError(weights, f"has one factor of {name} and not the other", "save the adapter again")
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != shape:
        raise UserError(
            weights, f"its factors {list(b)} and {list(a)} do not fit {name}, {list(shape)}", "name the adapter of this model"
        )


def _scale(config: dict, file: Path, module: str, rank: int) -> float:
    """Of the modules that alpha_pattern names, by all of their path or its end, the first that fits counts. peft takes any
    regular expression there; one from a file could run for ever."""
    patterns = config.get("alpha_pattern") or {}
    other = next((pattern for pattern in patterns if not re.fullmatch(r"[\w.]+", pattern)), None)
    if other is not None:
        raise UserError(file, f"alpha_pattern has {other!r}, which is no module's name", REMEDY)
    named = [alpha for name, alpha in patterns.items() if f".{module}".endswith(f".{name}")]
    alpha = named[0] if named else config["lora_alpha"]
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _whole(checkpoint: Checkpoint, entry: TensorEntry) -> torch.Tensor:
    return replace(checkpoint, tensors={entry.name: entry}, joined={}).load(entry.name)

"""Checkpoints and the architectures that read them: one family a module, found by config.json's model_type.

A new family is a module with `ARCHITECTURES`, the class names that config.json may give, `PREFIX`, what its tensors'
names begin with where the head is saved too, and `build(config, where)`: a torch module whose state_dict has the
checkpoint's tensor names, with `dimensions` and a forward like suture.models.qwen's; and its line in FAMILIES.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from suture.core.errors import UserError
from suture.models import checkpoint as checkpoints
from suture.models.checkpoint import CONFIG, Checkpoint
from suture.models.config import check_config
from suture.models.dimensions import Dimensions
from suture.models.packed import check_biases

__all__ = ["Checkpoint", "Dimensions", "architecture", "checkpoint_folder", "load_model", "meta_model", "open_checkpoint"]

FAMILIES = {
    "qwen": "suture.models.qwen",
    "llama": "suture.models.llama",
    "aquila": "suture.models.llama",
    "mistral": "suture.models.llama",
    "qwen2": "suture.models.llama",
    "qwen3": "suture.models.llama",
    "gpt2": "suture.models.gpt2",
    "opt": "suture.models.opt",
    "gpt_bigcode": "suture.models.gptbigcode",
    "mpt": "suture.models.mpt",
    "cpmant": "suture.models.cpmant",
    "cpmbee": "suture.models.cpmbee",
    "whisper": "suture.models.whisper",
}


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint that comes with the project. Raises UserError naming those there are."""
    named = shipped()
    if name not in named:
        raise UserError(f"--model {name}", f"is none of {', '.join(sorted(named))}", "or give --checkpoint DIR")
    return named[name]


def shipped() -> dict[str, Path]:
    """The folders of checkpoints that come with the project, by name."""
    return {config.parent.name: config.parent for config in Path(__file__).parent.glob(f"*/{CONFIG}")}


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """models.checkpoint.open_checkpoint, tensors under the names that the architecture gives them: a decoder saved without
    its head lacks the first part of each."""
    checkpoint = checkpoints.open_checkpoint(folder)
    family = _named_family(checkpoint.config)
    return checkpoint.under(family.PREFIX) if family else checkpoint


def architecture(config: dict, where: Path) -> nn.Module:
    """The module that a config.json (at `where`, for errors) describes, without weights: its parameters are on the device
    "meta", tables that the config alone decides on the CPU. Eval mode. Raises UserError for a value that its key cannot have."""
    check_config(config, where)
    with torch.device("meta"):
        return _family(config, where).build(config, where).eval()


def meta_model(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's architecture without weights (device "meta", eval mode), its tensors' names and shapes checked
    against the files. Raises UserError for an architecture that is not supported, a missing tensor, a wrong shape."""
    model = architecture(checkpoint.config, checkpoint.folder / CONFIG)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        checkpoint.entry(name, tuple(tensor.shape))
    check_biases(checkpoint, tensors)
    return model


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The checkpoint's model with its weights, all in `dtype`, in eval mode. Raises as meta_model does."""
    model = meta_model(checkpoint)
    weights = {name: checkpoint.load(name).to(dtype) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).to(device)


def _family(config: dict, where: Path) -> ModuleType:
    family, named = _named_family(config), _architectures(config)
    if family is None or (named and not named & set(family.ARCHITECTURES)):
        kinds = {module: "/".join(kind for kind in FAMILIES if FAMILIES[kind] == module) for module in FAMILIES.values()}
        supported = ", ".join(f"{kind} ({'/'.join(import_module(name).ARCHITECTURES)})" for name, kind in kinds.items())
        found = f"{config.get('model_type')} ({'/'.join(sorted(named)) or 'no architecture named'})"
        raise UserError(where, f"architecture {found} is not supported", f"supported: {supported}")
    return family


def _named_family(config: dict) -> ModuleType | None:
    """By config.json's model_type, and where it has none, as DeciCoder's, by the class that it names."""
    if "model_type" in config:
        module = FAMILIES.get(config["model_type"])
        return import_module(module) if module else None
    families = (import_module(module) for module in dict.fromkeys(FAMILIES.values()))
    return next((family for family in families if _architectures(config) & set(family.ARCHITECTURES)), None)


def _architectures(config: dict) -> set[str]:
    return set(map(str, config.get("architectures") or []))

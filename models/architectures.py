"""The architecture of a checkpoint: suture.models.families' module of its config.json's model_type."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import torch
from torch import nn

from suture.core.errors import UserError
from suture.models import checkpoint as checkpoints
from suture.models import diffusers_folder, families
from suture.models.checkpoint import CONFIG, Checkpoint, Weights, of_library
from suture.models.config import check_config
from suture.models.lora import with_adapter
from suture.models.packed import check_biases
from suture.models.scaled import with_meant_weights


def open_checkpoint(folder: Path | str, lora: Path | None = None) -> Checkpoint:
    """models.checkpoint.open_checkpoint, tensors under the names that the architecture gives them: a decoder saved without
    its head lacks the first part of each. `lora`: the folder of an adapter, merged into the weights."""
    checkpoint = _open(Path(folder))
    if lora is None:
        return checkpoint
    if "networks" in checkpoint.config:
        raise UserError(lora, "is an adapter, which only a model with one config.json takes", "leave --lora out")
    return with_adapter(checkpoint, lora, meta_model(checkpoint).state_dict())


def _open(folder: Path) -> Checkpoint:
    if diffusers_folder.is_folder(folder):
        index = diffusers_folder.read_model_index(folder)
        family = _family({"architectures": [index["_class_name"]]}, folder / diffusers_folder.MODEL_INDEX)
        return diffusers_folder.open_folder(folder, index, family.NETWORKS, family.OPTIONAL, family.renamed)
    checkpoint = with_meant_weights(checkpoints.open_checkpoint(folder, _reader))
    family = _named_family(checkpoint.config)
    if family is None and _library(checkpoint.config):
        from suture.models.conversions import named_as  # here: see _library

        return named_as(architecture(checkpoint.config, checkpoint.folder / CONFIG), checkpoint)
    if family is None:
        return checkpoint
    known = getattr(family, "with_known_names", None)
    return known(checkpoint) if known else checkpoint.under(family.PREFIX)


def _reader(config: dict) -> Callable[[Path], Weights]:
    """What reads a folder's weights: a family that was published in pieces knows them."""
    return getattr(_named_family(config), "read_pieces", of_library)


def architecture(config: dict, where: Path) -> nn.Module:
    """The module that a config.json (at `where`, for errors) describes, without weights: its parameters are on the device
    "meta", tables that the config alone decides on the CPU. Eval mode. Raises UserError for a value that its key cannot have."""
    check_config(config, where)
    with torch.device("meta"):
        return _family(config, where).build(config, where).eval()


def meta_model(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's architecture without weights (device "meta", eval mode), its tensors' names and shapes checked
    against the files. Raises UserError for an architecture that is not supported, a missing tensor, a wrong shape."""
    model = architecture(checkpoint.config, checkpoint.described[0])
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        checkpoint.check(name, tuple(tensor.shape))
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
    if family is None and (library := _library(config)):
        return library
    if family is None or (named and not named & set(family.ARCHITECTURES)):
        supported = ", ".join(f"{name} ({'/'.join(module.ARCHITECTURES)})" for name, module in _families().items())
        found = f"{config.get('model_type')} ({'/'.join(sorted(named)) or 'no architecture named'})"
        raise UserError(where, f"architecture {found} is not supported", f"supported: {supported}")
    return family


def _library(config: dict) -> ModuleType | None:
    """What knows any model of its kind that transformers has."""
    from suture.models import causal_lm, image_text  # here: transformers takes longer to import than all else, and few need it

    return next((each for each in (causal_lm, image_text) if each.knows(config)), None)


def _named_family(config: dict) -> ModuleType | None:
    """By config.json's model_type, and where it has none, as DeciCoder's, by the class that it names."""
    if "model_type" in config:
        return import_module(f"{families.__name__}.{config['model_type']}") if config["model_type"] in _names() else None
    return next((family for family in _families().values() if _architectures(config) & set(family.ARCHITECTURES)), None)


def _names() -> list[str]:
    return sorted(module.name for module in iter_modules(families.__path__))


def _families() -> dict[str, ModuleType]:
    return {name: import_module(f"{families.__name__}.{name}") for name in _names()}


def _architectures(config: dict) -> set[str]:
    return set(map(str, config.get("architectures") or []))

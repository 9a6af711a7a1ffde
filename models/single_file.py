"""Stable Diffusion or a ControlNet in the single-file layout that it was first published in, to diffusers' folder layout.

The file holds all networks' weights under the names of the original code; which networks these are, and their dimensions, a folder in
diffusers' layout says, or a preset. diffusers' own functions know which name becomes which. A pickle becomes safetensors first
(suture.models.pickles): what is read here holds nothing but tensors, which stay in their file until they are written.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.reader import read_json
from suture.core.refusals import refusals
from suture.core.safetensors_header import read_header
from suture.core.typed import read_typed
from suture.models.checkpoint import CONFIG, SINGLE
from suture.models.diffusers_folder import DIFFUSERS, MODEL_INDEX, REMEDY, NetworkConfig, is_folder
from suture.models.families.stable_diffusion import ARCHITECTURES, CLASSES
from suture.models.latent_diffusion import library, network, renamed
from suture.models.named import preset_path, presets
from suture.models.pickles import convert

WHOLE, CONTROL = "model.diffusion_model.", ("control_model.", "input_hint_block.")
NETWORKS = ("text_encoder", "unet", "vae", "controlnet")


def convert_single_file(file: Path, out: Path, like: str) -> list[Path]:
    """Writes the networks in `file` into `out`, each into its own folder, and returns these. `like`: a folder in diffusers' layout or
    a preset, whose config.json they get. Raises UserError for a file of another layout or other dimensions, and where a network's
    folder exists."""
    configs = read_configs(like)
    with tempfile.TemporaryDirectory(prefix="suture-") as scratch:
        flat = [file] if file.suffix == ".safetensors" else convert(file, Path(scratch) / "flat")[0]
        for each in flat:
            if each.suffix == ".safetensors":
                read_header(each)  # which refuses what is none
        with refusals(file, "cannot be read", "download it again"):
            weights = {name: value for each in flat if each.suffix == ".safetensors" for name, value in load_file(each).items()}
        found = networks(weights, configs, file)
        for name, tensors in found.items():
            if (out / name).exists():
                raise UserError(out / name, "exists", "name another OUT")
            _check(name, tensors, configs[name], file)
        for name, tensors in found.items():
            folder = out / name
            folder.mkdir(parents=True)
            single = SINGLE if name == "text_encoder" else f"{DIFFUSERS}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / single, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(configs[name], indent=2) + "\n", encoding="utf-8")
        if "unet" in found and not is_folder(out):
            index = {"_class_name": ARCHITECTURES[0], **{name: [None, None] for name in found}}
            (out / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [out / name for name in found]


def networks(weights: Mapping[str, Tensor], configs: Mapping[str, dict], file: Path) -> dict[str, dict[str, Tensor]]:
    """By network, its tensors under diffusers' names."""
    library(file)
    from diffusers.loaders import single_file_utils as layout

    if any(name.startswith(WHOLE) for name in weights):
        needed = ("text_encoder", "unet", "vae")
    elif any(name.startswith(CONTROL) for name in weights):
        needed = ("controlnet",)
    else:
        wrong = f"is not Stable Diffusion or a ControlNet in its first layout: no tensor begins with {WHOLE} or {CONTROL[0]}"
        raise UserError(file, wrong, "leave --like out")
    for name in needed:
        if name not in configs:
            raise UserError(file, f"holds a {name}, of which --like says nothing", "name a folder that has its config.json")
    with refusals(file, "does not go with the dimensions of --like", "name the folder of the same model"):
        if needed == ("controlnet",):
            return {"controlnet": layout.convert_controlnet_checkpoint(weights, configs["controlnet"])}
        return {
            "text_encoder": layout.convert_ldm_clip_checkpoint(weights),
            "unet": layout.convert_ldm_unet_checkpoint(weights, configs["unet"]),
            "vae": layout.convert_ldm_vae_checkpoint(weights, configs["vae"]),
        }


def _check(name: str, tensors: Mapping[str, Tensor], config: dict, file: Path) -> None:
    """Raises UserError unless these are all weights that the network has, in its dimensions."""
    given = {renamed(f"{name}.{key}"): tuple(tensor.shape) for key, tensor in tensors.items()}
    with torch.device("meta"):
        needed = network(name, config, CLASSES, file).state_dict()
    for key, tensor in needed.items():
        shape = given.get(f"{name}.{key}")
        if shape != tuple(tensor.shape) and not key.endswith("position_ids"):  # which are counted, not saved
            wrong = (
                f"{key} of its {name} is {'not there' if shape is None else list(shape)}, and --like says {list(tensor.shape)}"
            )
            raise UserError(file, wrong, "name the folder of the same model")


def read_configs(like: str) -> dict[str, dict]:
    """By network, its config.json. Raises UserError where `like` names none."""
    if like in presets():
        found = read_json(preset_path(like), "choose a preset").get("networks") if _fits(like) else None
    else:
        folder = Path(like)
        there = [name for name in NETWORKS if (folder / name / CONFIG).exists()]
        found = {name: read_typed(inside(folder, f"{name}/{CONFIG}"), NetworkConfig, REMEDY) for name in there}
    if not found:
        known = ", ".join(each for each in presets() if _fits(each))
        raise UserError(f"--like {like}", "says nothing of a picture model's networks", f"name its folder, or one of {known}")
    return found


def _fits(preset: str) -> bool:
    """Whether the preset is of a family that was published in this layout."""
    return bool(set(read_json(preset_path(preset), "choose a preset").get("architectures", [])) & set(ARCHITECTURES))

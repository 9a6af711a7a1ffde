"""What `--model NAME` can name: checkpoints that come with the project, each in a folder beside this file, and the dimensions
of published models, a config.json each in presets/."""

import json
from pathlib import Path

from suture.core.errors import UserError

PRESETS = Path(__file__).parent / "presets"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint that comes with the project. Raises UserError naming those there are."""
    named = shipped()
    if name not in named:
        raise UserError(f"--model {name}", f"is none of {', '.join(sorted(named))}", "or give --checkpoint DIR")
    return named[name]


def shipped() -> dict[str, Path]:
    """The folders of checkpoints that come with the project, by name."""
    described = [found for name in ("config.json", "model_index.json") for found in Path(__file__).parent.glob(f"*/{name}")]
    return {file.parent.name: file.parent for file in described}


def presets() -> list[str]:
    """The models whose dimensions come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def decoders() -> list[str]:
    """Those of the presets that are one config.json, and not several networks'."""
    return [name for name in presets() if "networks" not in read_config(preset_path(name))]


def preset_path(name: str) -> Path:
    return PRESETS / f"{name}.json"


def read_config(path: Path, layers: int | None = None) -> dict:
    """A config.json, with another number of layers if one is given. Raises UserError where it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(path, f"cannot be read ({error})", "name a config.json") from None
    return config if layers is None else _with_layers(config, layers)


def _with_layers(config: dict, layers: int) -> dict:
    """Also the configs of a model's parts in it. Where some layers attend to all of a picture, others to windows, the last one does."""
    inner = {key: _with_layers(value, layers) for key, value in config.items() if isinstance(value, dict)}
    config = config | inner | {key: layers for key in LAYER_KEYS if key in config}
    config.pop("layer_types", None)  # one word a layer, which follows from what else is there
    return config | {key: [layers - 1] for key in ("global_attn_indexes",) if key in config}

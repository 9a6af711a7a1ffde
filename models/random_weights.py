"""Random weights in the layout of a real model's checkpoint: its tensors' names and shapes, its type, its shards.

What costs and bounds depend on, sizes and layout, is real; what cannot be downloaded everywhere, the values, is drawn
from a seed, the same on every machine. Memory stays at a few chunks.
"""

import json
import math
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from suture.core.errors import UserError
from suture.core.reader import read_json
from suture.core.safetensors_header import FLOATS
from suture.models.architectures import architecture
from suture.models.checkpoint import CONFIG, INDEX, SINGLE
from suture.models.diffusers_folder import DIFFUSERS, MODEL_INDEX
from suture.models.named import preset_path, read_config

SHARD_BYTES = 2_050_000_000  # cuts Qwen-7B into the shards that were published
CHUNK = 1 << 22  # elements drawn at once
ALIGNMENT = 64
MADE = "random_weights.txt"  # says whose the files beside it are
SAFETENSORS = {name: code for code, name in FLOATS.items()}


@dataclass(frozen=True)
class Draw:
    """One tensor: uniform around `mean` with the standard deviation `std`, which is how torch itself draws weights."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def write(config: dict, out: Path, dtype: str, seed: int | None, shard_bytes: int = SHARD_BYTES) -> tuple[int, int]:
    """Writes the checkpoint, values left out where `seed` is None; returns its tensors' bytes and its files' number.

    config.json comes last: a folder that a killed run leaves is not a checkpoint.
    """
    others = [name for name in (CONFIG, INDEX, SINGLE, *_shards_in(out)) if (out / name).exists()]
    if others and not (out / MADE).exists():
        raise UserError(out / others[0], "was not made here and would be replaced", "name another folder with --out")
    draws = _draws(architecture(config, out / CONFIG))
    itemsize = getattr(torch, dtype).itemsize
    shards = _shards(draws, itemsize, shard_bytes)
    size = itemsize * sum(draw.elements for draw in draws)
    out.mkdir(parents=True, exist_ok=True)
    (out / MADE).write_text(
        "random weights, made by suture.models.random_checkpoint: these files may be replaced by others\n", encoding="utf-8"
    )
    for stale in (CONFIG, INDEX, SINGLE, *_shards_in(out)):
        (out / stale).unlink(missing_ok=True)
    free = os.statvfs(out).f_bavail * os.statvfs(out).f_frsize
    if size > free and seed is not None:
        raise UserError(out, f"no space left: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", "choose another --out")

    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        _write_shard(out / name, shard, dtype, seed)
    if len(shards) > 1:
        places = {draw.name: name for name, shard in zip(names, shards) for draw in shard}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / CONFIG).write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    return size, len(shards)


def write_networks(config: dict, out: Path, dtype: str, seed: int | None) -> int:
    """The same of a model of several networks, in diffusers' layout and without tokenizer and scheduler. Returns its tensors' bytes."""
    if (out / MODEL_INDEX).exists() and not (out / MADE).exists():
        raise UserError(out / MODEL_INDEX, "was not made here and would be replaced", "name another folder with --out")
    draws = _draws(architecture(config, out / MODEL_INDEX))
    size = getattr(torch, dtype).itemsize * sum(draw.elements for draw in draws)
    out.mkdir(parents=True, exist_ok=True)
    (out / MADE).write_text("random weights, made by suture: these files may be replaced by others\n", encoding="utf-8")
    (out / MODEL_INDEX).unlink(missing_ok=True)
    free = shutil.disk_usage(out).free
    if size > free and seed is not None:
        raise UserError(out, f"no space left: needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", "choose another --out")
    for network, own in config["networks"].items():
        (out / network).mkdir(exist_ok=True)
        prefix = f"{network}."
        mine = [replace(draw, name=draw.name.removeprefix(prefix)) for draw in draws if draw.name.startswith(prefix)]
        single = SINGLE if "_class_name" not in own else f"{DIFFUSERS}.safetensors"
        _write_shard(out / network / single, mine, dtype, seed)
        (out / network / CONFIG).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    index = _model_index(config, dtype)
    (out / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def _model_index(config: dict, dtype: str) -> dict:
    return {"_class_name": config["architectures"][0], **config, "torch_dtype": dtype}


def _shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))


def of_preset(name: str, out: Path, dtype: str) -> bool:
    """The checkpoint of a preset in `out`, as write makes it; returns whether it had to be made."""
    config = read_config(preset_path(name))
    if "networks" in config:
        made = out / MODEL_INDEX
        if made.exists() and (out / MADE).exists() and read_json(made) == _model_index(config, dtype):
            return False
        write_networks(config, out, dtype, seed=0)
        return True
    made = out / CONFIG
    if made.exists() and (out / MADE).exists() and read_json(made) == {**config, "torch_dtype": dtype}:
        return False
    write(config, out, dtype, seed=0)
    return True


def _draws(model: nn.Module) -> list[Draw]:
    """How each tensor is drawn, so that activations neither grow nor fade: matrices keep a row's variance, norms are
    near 1, biases small; of several matrices in one flat parameter the module says the deviation."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    flat = {f"{name}.params": module.deviation for name, module in model.named_modules() if hasattr(module, "deviation")}
    draws = []
    for name, tensor in model.state_dict().items():
        if name in embeddings:
            mean, std = 0.0, 1.0
        elif name in flat:
            mean, std = 0.0, flat[name]
        elif tensor.dim() > 1:
            mean, std = 0.0, math.prod(tensor.shape[1:]) ** -0.5
        else:
            mean, std = (0.0, 0.02) if name.endswith("bias") else (1.0, 0.1)
        draws.append(Draw(name, tuple(tensor.shape), mean, std))
    return draws


def _shards(draws: list[Draw], itemsize: int, limit: int) -> list[list[Draw]]:
    """Fills a shard until the next tensor would pass the limit, as Hugging Face's save_pretrained does."""
    shards, size = [[]], 0
    for draw in draws:
        length = itemsize * draw.elements
        if shards[-1] and size + length > limit:
            shards.append([])
            size = 0
        shards[-1].append(draw)
        size += length
    return shards


def _write_shard(path: Path, shard: list[Draw], dtype: str, seed: int | None) -> None:
    shard = sorted(shard, key=lambda draw: draw.name)  # as safetensors itself orders what it writes
    itemsize = getattr(torch, dtype).itemsize
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for draw in shard:
        length = itemsize * draw.elements
        header[draw.name] = {
            "dtype": SAFETENSORS[dtype],
            "shape": list(draw.shape),
            "data_offsets": [end, end + length],
        }
        end += length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    data = 8 + len(encoded)

    def write_chunk(draw: Draw, first: int) -> None:
        values = _chunk(draw, first, seed).to(getattr(torch, dtype))
        offset = data + header[draw.name]["data_offsets"][0] + itemsize * first
        os.pwrite(file.fileno(), values.view(torch.uint8).numpy(), offset)

    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.flush()
        file.truncate(data + end)
        if seed is None:
            return
        pending = [pool.submit(write_chunk, draw, i) for draw in shard for i in range(0, draw.elements, CHUNK)]
        for each in pending:
            each.result()


def _chunk(draw: Draw, first: int, seed: int) -> torch.Tensor:
    """float32 [≤ CHUNK]: elements from `first` on, from 16 random bits each."""
    count = min(CHUNK, draw.elements - first)
    stream = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(draw.name.encode()), first]))
    bits = stream.random_raw((count + 3) // 4).view(np.int16)[:count]
    step = draw.std * math.sqrt(12) / (1 << 16)
    return torch.from_numpy(bits).float().add_(0.5).mul_(step).add_(draw.mean)

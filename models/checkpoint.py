"""A checkpoint folder in Hugging Face layout, opened by its headers: no weight is read until it is asked for.

Only config.json and safetensors files are looked at, and nothing in them is ever executed. The format is 8 bytes of
header length, a JSON header, then the tensors (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from suture.core.errors import UserError
from suture.core.reader import open_regular, read_json
from suture.models.packed import PACKED, WEIGHT, is_packed, load_packed, packed_shape

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
PIECE = 1 << 26  # bytes read at once
HEADER_LIMIT = 100_000_000  # bytes; the format's own


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. `dtype` is torch's name where torch computes in it (float32), else safetensors' own (I8)."""

    name: str  # in the file
    file: Path  # as found in the folder, symbolic links not followed
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the file's beginning
    length: int  # bytes


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict
    tensors: dict[str, TensorEntry]  # by the architecture's name for each

    @property
    def files(self) -> list[Path]:
        """All that it is read from: config.json, the index of shards where there is one, and the weights' files."""
        index = [self.folder / INDEX] if (self.folder / INDEX).exists() else []
        return [self.folder / CONFIG, *index, *sorted({entry.file for entry in self.tensors.values()})]

    def under(self, prefix: str) -> "Checkpoint":
        """The same, where tensors were saved without the prefix that the architecture's names begin with."""
        if any(name.startswith(prefix) for name in self.tensors):
            return self
        return replace(self, tensors={prefix + name: entry for name, entry in self.tensors.items()})

    @cached_property
    def dtype(self) -> str:
        """The floating-point type that most of its bytes have: "float32", "float16" or "bfloat16"."""
        sizes = Counter()
        for entry in self.tensors.values():
            if entry.dtype.startswith(("float", "bfloat")):
                sizes[entry.dtype] += entry.length
        if not sizes:
            raise UserError(self.folder, "has no floating-point weights", "use a checkpoint that is not quantised")
        return sizes.most_common(1)[0][0]

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> TensorEntry:
        """Raises UserError where the tensor is missing, or has another shape than the architecture gives it."""
        if is_packed(self, name):
            entry = replace(self.tensors[name.removesuffix(WEIGHT) + PACKED], shape=packed_shape(self, name))
        elif name in self.tensors:
            entry = self.tensors[name]
        else:
            raise UserError(self.folder, f"has no tensor {name}", "check that config.json and weights belong together")
        if shape is not None and entry.shape != tuple(shape):
            raise UserError(
                entry.file,
                f"{name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}",
                "check that config.json and weights belong together",
            )
        return entry

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its stored type, on the CPU; one that is packed in few bits as float32."""
        if is_packed(self, name):
            return load_packed(self, name).dequantised()
        entry = self.entry(name)
        try:
            with safe_open(entry.file, framework="pt") as file:
                return file.get_tensor(entry.name)
        except SafetensorError as error:
            raise UserError(entry.file, f"is not a valid safetensors file ({error})", "download it again") from None

    def load_float32(self, name: str, rounded_to: torch.dtype) -> torch.Tensor:
        """The tensor as float32, its values those of `rounded_to`. Read in pieces: there is never a second copy."""
        if is_packed(self, name):
            return self.load(name).to(rounded_to).float()
        entry = self.entry(name)
        stored = getattr(torch, entry.dtype)
        whole = torch.empty(entry.shape, dtype=torch.float32)
        flat, buffer = whole.view(-1), bytearray(PIECE)
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            for start in range(0, entry.length, PIECE):
                piece = memoryview(buffer)[: min(PIECE, entry.length - start)]
                file.readinto(piece)
                values = torch.frombuffer(piece, dtype=stored)
                first = start // stored.itemsize
                flat[first : first + len(values)] = values.to(rounded_to)
        return whole


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads config.json and the headers of model.safetensors, or of the shards that its index names.

    Raises UserError where one of them is missing, truncated or not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(folder, "no such folder", "name a checkpoint folder with config.json and safetensors files")
    config = read_json(folder / CONFIG, "name a checkpoint folder with a config.json")
    if (folder / INDEX).exists():
        return Checkpoint(folder, config, _read_shards(folder))
    if not (folder / SINGLE).exists():
        raise _no_weights(folder)
    return Checkpoint(folder, config, read_header(folder / SINGLE))


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises UserError where it is missing, corrupt or shorter than it says."""
    if not file.exists():
        raise UserError(file, "is missing", "download the checkpoint's shards again")
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT
        header = stream.read(header_size) if header_size < HEADER_LIMIT else b""
    try:
        found = json.loads(header)
        found.pop("__metadata__", None)
        entries = {name: _entry(name, file, 8 + header_size, place) for name, place in found.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        if 8 + header_size > size > 8 and header_size < HEADER_LIMIT:
            raise _truncated(file, size, 8 + header_size) from None
        raise UserError(file, "is not a safetensors file: its header is corrupt", "download it again") from None
    end = max((entry.offset + entry.length for entry in entries.values()), default=0)
    if end > size:
        raise _truncated(file, size, end)
    return entries


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    index = read_json(folder / INDEX, "download the index again")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(folder / INDEX, "has no weight_map", "download the index again")
    tensors = {}
    for shard in sorted({str(place) for place in places.values()}):
        if Path(shard).name != shard:
            raise UserError(folder / INDEX, f"names a shard outside its folder, {shard}", "put the shards beside it")
        if Path(shard).suffix != ".safetensors":
            raise UserError(folder / shard, "is not a safetensors file", "convert the checkpoint to safetensors")
        found = read_header(folder / shard)
        lacking = next((name for name, place in places.items() if place == shard and name not in found), None)
        if lacking is not None:
            raise UserError(folder / shard, f"has no tensor {lacking}, which the index puts there", "download both again")
        tensors |= {name: entry for name, entry in found.items() if places.get(name) == shard}
    return tensors


def _entry(name: str, file: Path, data: int, place: dict) -> TensorEntry:
    begin, end = place["data_offsets"]
    shape = tuple(place["shape"])
    dtype, itemsize = FLOATS.get(place["dtype"], (place["dtype"], None))
    if not 0 <= begin <= end or (itemsize and end - begin != itemsize * math.prod(shape)):
        raise ValueError
    return TensorEntry(name, file, dtype, shape, data + begin, end - begin)


def _no_weights(folder: Path) -> UserError:
    pickled = next((found for pattern in PICKLES for found in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        return UserError(pickled, "is a pickle, which can run code when read", "convert the checkpoint to safetensors")
    return UserError(folder, f"has neither {SINGLE} nor {INDEX}", "download the weights as safetensors")


def _truncated(file: Path, size: int, end: int) -> UserError:
    return UserError(file, f"truncated: {size} bytes, but its header says {end}", "download it again")

"""A checkpoint folder in Hugging Face layout, opened by its headers: no weight is read until it is asked for.

Only config.json and safetensors files are looked at, and nothing in them is ever executed.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.refusals import refusals
from suture.core.safetensors_header import TensorEntry, read_header
from suture.models.config import read_config, read_index
from suture.models.packed import PACKED, WEIGHT, is_packed, load_packed, packed_shape

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PIECE = 1 << 26  # bytes read at once
CONVERT = "suture convert FILE OUT"


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of the architecture that is computed when it is read, of pieces that the checkpoint holds, say, or of what an
    adapter adds to it."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    made_of: tuple[TensorEntry, ...] = ()  # what it reads that the checkpoint's `tensors` leave out


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict
    tensors: dict[str, TensorEntry]  # by the architecture's name for each, but those that only `joined` reads
    described: tuple[Path, ...]  # config.json, or what stands in its place, and what else was read beside the weights
    joined: Mapping[str, JoinedTensor] = field(default_factory=dict)  # by the architecture's name

    @property
    def files(self) -> list[Path]:
        """All that it is read from: config.json, the index of shards where there is one, and the weights' files."""
        parts = (entry for joined in self.joined.values() for entry in joined.made_of)
        return [*self.described, *sorted({entry.file for entry in (*self.tensors.values(), *parts)})]

    def under(self, prefix: str) -> "Checkpoint":
        """The same, where tensors were saved without the prefix that the architecture's names begin with."""
        if any(name.startswith(prefix) for name in self.tensors):
            return self
        tensors, joined = ({prefix + name: each for name, each in of.items()} for of in (self.tensors, self.joined))
        return replace(self, tensors=tensors, joined=joined)

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

    def stored(self, name: str) -> TensorEntry | JoinedTensor | None:
        """Where the tensor of that name lies, or how it is put together; None where there is none, or it is packed."""
        return self.joined.get(name) or self.tensors.get(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError where the tensor is missing, or has another shape than the architecture gives it."""
        if name not in self.joined:
            self.entry(name, shape)

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
        if name in self.joined:
            return self._put_together(name)
        entry = self.entry(name)
        with (
            refusals(entry.file, "is not a valid safetensors file", "download it again"),
            safe_open(entry.file, framework="pt") as file,
        ):
            return file.get_tensor(entry.name)

    def load_float32(self, name: str, rounded_to: torch.dtype) -> torch.Tensor:
        """The tensor as float32, its values those of `rounded_to`. Read in pieces: there is never a second copy."""
        if is_packed(self, name) or name in self.joined:
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

    def _put_together(self, name: str) -> torch.Tensor:
        joined = self.joined[name]
        remedy = "check that config.json and weights belong together"
        with refusals(self.folder, f"has pieces of {name} that do not fit together", remedy):
            tensor = joined.load()
        if tuple(tensor.shape) != joined.shape:
            reason = f"has pieces of {name} of shape {list(tensor.shape)}, but config.json asks for {list(joined.shape)}"
            raise UserError(self.folder, reason, remedy)
        return tensor


Weights = tuple[list[Path], dict[str, TensorEntry]]  # what describes them beside config.json, and their places by name


def of_library(folder: Path) -> Weights:
    """Of a folder as libraries write it."""
    return read_weights(folder, [(SINGLE, INDEX)])


def open_checkpoint(
    folder: Path | str, reader: Callable[[dict], Callable[[Path], Weights]] = lambda _: of_library
) -> Checkpoint:
    """Reads config.json and the headers of model.safetensors, or of the shards that its index names. `reader`: of a config.json, what
    reads the folder's weights in their place.

    Raises UserError where one of them is missing, truncated or not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(folder, "no such folder", "name a checkpoint folder with config.json and safetensors files")
    config = read_config(inside(folder, CONFIG))
    index, tensors = reader(config)(folder)
    return Checkpoint(folder, config, tensors, (folder / CONFIG, *index))


def read_weights(folder: Path, places: Sequence[tuple[str, str]]) -> Weights:
    """The tensors of the first of `places` that there is: a file of weights, or the index of its shards, by their names in the
    folder. With them the index, where there is one. Raises UserError where there is none of them."""
    for single, index in places:
        if os.path.lexists(folder / index):  # a link to nothing is a download that is not complete
            return [folder / index], _read_shards(folder, index)
        if (folder / single).exists():
            return [], read_header(inside(folder, single))
    raise _no_weights(folder, *places[0])


def _read_shards(folder: Path, index: str) -> dict[str, TensorEntry]:
    places = read_index(inside(folder, index))
    beside = (folder / index).parent
    tensors = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\0" in shard:
            raise UserError(folder / index, f"names a shard outside its folder, {shard!r}", "put the shards beside it")
        if Path(shard).suffix != ".safetensors":
            raise UserError(beside / shard, "is not a safetensors file", f"convert the checkpoint: {CONVERT}")
        found = read_header(inside(folder, str(Path(index).parent / shard)))
        lacking = next((name for name, place in places.items() if place == shard and name not in found), None)
        if lacking is not None:
            raise UserError(beside / shard, f"has no tensor {lacking}, which the index puts there", "download both again")
        tensors |= {name: entry for name, entry in found.items() if places.get(name) == shard}
    return tensors


def _no_weights(folder: Path, single: str, index: str) -> UserError:
    beside, names = (folder / single).parent, (Path(single).name, Path(index).name)
    pickled = next((found for pattern in PICKLES for found in sorted(beside.glob(pattern))), None)
    if pickled is not None:
        return UserError(pickled, "is a pickle, which can run code when read", f"convert it with {CONVERT}, which runs none")
    return UserError(beside, f"has neither {names[0]} nor {names[1]}", "download the weights as safetensors")

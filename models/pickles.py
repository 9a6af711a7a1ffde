"""A published .pth, .bin or .ckpt file to safetensors, which export reads.

Such a file is a pickle, a program that makes objects. torch's restricted unpickler (weights_only) knows tensors and the containers
around them and calls nothing else; it runs in a child process with limits of time and memory, as what it reads may grow or crash it.
Weights keep their names and types, but that a published file of SAM gets transformers' names and a config.json. They are mapped, not
read, and written one after another: memory holds the largest of them.
"""

import json
import math
import multiprocessing
import os
import resource
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from suture.core import reader
from suture.core.errors import UserError
from suture.core.refusals import BrokenFile, refusals
from suture.models import segment_anything

SHARD_BYTES = 5_000_000_000
LOADING, WRITING = 60, 6 * 3600  # seconds
READ = 20_000_000  # bytes a second, beside LOADING: slow disks have more
MEMORY = 3 << 30  # bytes beside the file, which is mapped
MOST_COPIES = 4  # of the file's bytes: several names may share them, and safetensors holds each on its own
PIECE = 1 << 26  # bytes
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")  # around the weights in what training saves
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
CONFIG = "config.json"
REMEDY = "check where it comes from; only weights are converted"


def convert(file: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> tuple[list[Path], list[str]]:
    """Writes the weights of `file` into the folder `out`, or as `out` where that is a .safetensors name; from more than
    `shard_bytes` on in several files and their index. Returns these, and the names of what was no weight.

    Raises UserError for a file that holds anything but weights, that takes too long or too much, or whose results exist.
    """
    size = reader.status(file).st_size
    if file.suffix == ".safetensors":
        raise UserError(file, "is a safetensors file", "give its folder to export --checkpoint")
    target = out if out.suffix == ".safetensors" else out / "model.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f"{target.stem}*.safetensors*"):
        raise UserError(path, "exists", "name another OUT")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as partial:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(file, Path(partial), target.stem, size, shard_bytes, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            _answer(file, ours, child, LOADING + size // READ)
            names, left_out = _answer(file, ours, child, WRITING)
        finally:
            child.kill()
            child.join()
        for name in names:  # the index last; a name that somebody has made meanwhile is not replaced
            try:
                os.link(Path(partial) / name, target.parent / name)
            except FileExistsError:
                raise UserError(target.parent / name, "exists", "name another OUT") from None
    return [target.parent / name for name in names], left_out


def _answer(file: Path, connection: Connection, child: multiprocessing.Process, seconds: float) -> tuple[list[str], list[str]]:
    try:
        if not connection.poll(seconds):
            raise UserError(file, f"takes more than {seconds} seconds to read", REMEDY)
        answer = connection.recv()
    except EOFError:
        child.join()
        raise UserError(file, f"ended the process that read it (status {child.exitcode})", REMEDY) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(file: Path, folder: Path, stem: str, size: int, shard_bytes: int, connection: Connection) -> None:
    """The child: says when the file is read, and what it has written; or the error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit = size + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        weights, left_out = load(file)
        connection.send(([], []))
        weights, described = _known(weights, file, folder)
        names = write(weights, file, size, folder, stem, shard_bytes)
        connection.send(([*described, *names], left_out))
    except (UserError, OSError) as error:
        connection.send(error)
    except MemoryError:
        connection.send(UserError(file, f"needs more than {limit >> 20:,} MB of memory to read", REMEDY))


def _known(weights: dict[str, torch.Tensor], file: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights under the names by which a family reads them, where they are a published file's, and what is written beside."""
    if not segment_anything.is_published(weights):
        return weights, []
    with refusals(file, "is no file of SAM's weights", REMEDY):
        described, named = segment_anything.config(weights), segment_anything.renamed(weights)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return named, [CONFIG]


def load(file: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights in a pickle, mapped where its format allows that, and the names of what is left out: what is no weight, and weights
    that training has saved beside the model's."""
    with refusals(file, "holds more than weights, or is broken", REMEDY), warnings.catch_warnings(action="ignore"):
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    beside: list[object] = []
    for _ in WRAPPERS:
        inner = [key for key in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        if not inner:
            break
        beside += [key for key, value in found.items() if key != inner[0] and _holds_weights(value)]
        found = found[inner[0]]
    weights = (
        {key: value for key, value in found.items() if isinstance(value, torch.Tensor)} if isinstance(found, Mapping) else {}
    )
    if not weights:
        raise UserError(file, "holds no weights by name", REMEDY)
    return weights, [str(key)[:100] for key in (*beside, *(key for key in found if key not in weights))]


def _holds_weights(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, Mapping) and any(map(_holds_weights, value.values())))


def write(weights: dict[str, torch.Tensor], file: Path, size: int, folder: Path, stem: str, shard_bytes: int) -> list[str]:
    """Writes the weights of `file` into safetensors files called after `stem`; their names, the index last."""
    for name, tensor in weights.items():
        with refusals(file, f"{str(name)[:100]!r} is not a weight", REMEDY):
            _check(name, tensor)
    total = sum(map(_bytes, weights.values()))
    if total > MOST_COPIES * size:
        raise UserError(file, f"becomes {total:,} bytes, more than {MOST_COPIES} times what it has", REMEDY)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name in sorted(weights):
        if shards[-1] and filled + _bytes(weights[name]) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = weights[name]
        filled += _bytes(weights[name])
    count = len(shards)
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards):
        _write_shard(folder / name, shard)
    if count == 1:
        return names
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, f"{stem}.safetensors.index.json"]


def _check(name: object, tensor: torch.Tensor) -> None:
    """Raises BrokenFile for what safetensors cannot hold, or what would be more than the file has: a view that repeats."""
    if not isinstance(name, str) or name == "__metadata__":
        raise BrokenFile(f"{str(name)[:100]!r} is not the name of a weight")
    name.encode()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in CODES:
        raise BrokenFile(f"{name} is {tensor.layout} {tensor.dtype} on {tensor.device}, which safetensors cannot hold")
    if _bytes(tensor) > tensor.untyped_storage().nbytes():
        raise BrokenFile(f"{name} repeats its values: {list(tensor.shape)} in {tensor.untyped_storage().nbytes():,} bytes")


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_shard(path: Path, shard: dict[str, torch.Tensor]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in shard.items():
        place = [end, end + _bytes(tensor)]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in shard.values():
            if tensor.numel():
                flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                for start in range(0, len(flat), PIECE):
                    out.write(memoryview(flat[start : start + PIECE].numpy()))

"""Gives each initializer its bytes: by reference into the checkpoint's safetensors, or as a converted copy beside the graph.

Either way an initializer is a location, an offset and a length in a safetensors file, so every later stage sees one form.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from suture.core.dtypes import BY_NUMPY
from suture.core.errors import UserError
from suture.core.progress import counted
from suture.core.safetensors_header import TensorEntry
from suture.models.checkpoint import Checkpoint

COPY = "model.safetensors"
COPY_BELOW = 2_000_000_000  # bytes of weights, in the graph's dtype; above, a second copy is not made unasked
SHOWN = 1 << 28  # bytes of a copy that takes long enough to say so
CHUNK = 1 << 24  # elements converted at once
ALIGNMENT = 64


def attach(graph: ir.Model, checkpoint: Checkpoint, dtype: str, mode: str | None, folder: Path, out: Path) -> dict:
    """Points the graph's parameters at their bytes; writes the copy, where one is needed, into `folder`.

    mode: "copy", "reference" (where the dtype allows: the rest is copied), or None to choose by size.
    Returns what the manifest records: the mode, the weights root relative to `out`, bytes referenced and copied, and the
    weights that have NaN or infinity.
    """
    initializers = graph.graph.initializers
    names = [name for name in initializers if checkpoint.stored(name)]
    total = sum(_bytes(checkpoint, name, dtype) for name in names)
    mode = mode or ("copy" if total < COPY_BELOW else "reference")
    lies = {name for name in names if name not in checkpoint.joined and checkpoint.tensors[name].dtype == dtype}
    referenced = [name for name in names if mode == "reference" and name in lies]
    copied = [name for name in names if name not in set(referenced)]

    places = {name: checkpoint.tensors[name].file.resolve() for name in referenced}
    entries = {name: checkpoint.tensors[name] for name in referenced}
    if copied:
        entries |= write_copy(checkpoint, copied, dtype, folder / COPY)
        places |= dict.fromkeys(copied, out.resolve() / COPY)
    root = Path(os.path.commonpath([place.parent for place in places.values()])) if places else out.resolve()
    for name, place in places.items():
        entry = entries[name]
        initializers[name].const_value = ir.ExternalTensor(
            str(place.relative_to(root)),
            entry.offset,
            entry.length,
            getattr(ir.DataType, {"float32": "FLOAT"}.get(dtype, dtype.upper())),
            shape=ir.Shape(entry.shape),
            name=name,
        )
    return {
        "weights": mode,
        "not_finite": [name for name in names if not is_finite(checkpoint, name)],
        "weights_root": os.path.relpath(root, out.resolve()),
        "bytes_referenced": sum(entries[name].length for name in referenced),
        "bytes_copied": sum(entries[name].length for name in copied),
    }


def write_copy(checkpoint: Checkpoint, names: list[str], dtype: str, path: Path) -> dict[str, TensorEntry]:
    """Streams tensors, converted to `dtype`, into one safetensors file; memory stays at one chunk."""
    header, entries, end = {}, {}, 0
    for name in names:
        length = _bytes(checkpoint, name, dtype)
        header[name] = {
            "dtype": BY_NUMPY[dtype].safetensors,
            "shape": list(checkpoint.stored(name).shape),
            "data_offsets": [end, end + length],
        }
        end += length
    free = shutil.disk_usage(path.parent).free
    if end > free:
        raise UserError(
            path.parent.parent,
            f"no space left: the weights need {end / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "free some, choose another --out, or use --weights reference",
        )
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    start = 8 + len(encoded)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names if end < SHOWN else counted("export", "copying weights", names, len(names)):
            begin, end = header[name]["data_offsets"]
            for chunk in _converted(checkpoint, name, dtype):
                chunk.tofile(file)
            entries[name] = TensorEntry(name, path, dtype, checkpoint.stored(name).shape, start + begin, end - begin)
    return entries


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """Whether all values of a weight are numbers; what is read is mapped."""
    values = checkpoint.load(name).reshape(-1)
    return not values.is_floating_point() or all(bool(torch.isfinite(chunk).all()) for chunk in values.split(CHUNK))


def _converted(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator:
    for chunk in checkpoint.load(name).reshape(-1).split(CHUNK):
        converted = chunk.to(getattr(torch, dtype))
        if not torch.isfinite(converted).all() and torch.isfinite(chunk).all():
            raise UserError(checkpoint.folder, f"{name} has values that {dtype} cannot hold", "export with --dtype bfloat16")
        yield converted.view(torch.uint8).numpy()


def _bytes(checkpoint: Checkpoint, name: str, dtype: str) -> int:
    return math.prod(checkpoint.stored(name).shape) * getattr(torch, dtype).itemsize

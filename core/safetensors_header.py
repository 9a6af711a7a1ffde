"""The header of a safetensors file: where each tensor lies, and whether the file is what its header says.

The format is 8 bytes of header length, a JSON header, then the tensors (https://github.com/huggingface/safetensors#format).
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from suture.core.dtypes import BY_SAFETENSORS
from suture.core.errors import UserError
from suture.core.reader import open_regular, parse_json
from suture.core.refusals import BrokenFile

FLOATS = {code: BY_SAFETENSORS[code].numpy for code in ("F64", "F32", "F16", "BF16")}
HEADER_LIMIT = 100_000_000  # bytes; the format's own
LARGEST = 1 << 48  # of one dimension, or of a file
MOST_DIMENSIONS = 16
BITS = {  # of an element, by the format's name for its type
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. `dtype` is torch's name where torch computes in it (float32), else safetensors' own (I8)."""

    name: str  # in the file
    file: Path  # as found in the folder, symbolic links not followed
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the file's beginning
    length: int  # bytes


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises UserError where it is missing, corrupt or shorter than it says: each
    tensor's bytes are as many as its type and shape need, lie in the file, and belong to no other."""
    with open_regular(file, "download the checkpoint again") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT
        header = stream.read(header_size) if header_size < HEADER_LIMIT else b""
    if 8 + header_size > size > 8 and header_size < HEADER_LIMIT:
        raise _truncated(file, size, 8 + header_size)
    try:
        found = parse_json(header, file)
        found.pop("__metadata__", None)
        entries = {name: _entry(name, file, 8 + header_size, place) for name, place in found.items()}
        end = 8 + header_size
        for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.length)):
            if entry.offset < end:
                raise BrokenFile(f"the bytes of {entry.name} belong to another tensor, too")
            end = entry.offset + entry.length
    except UserError as error:
        raise _corrupt(file, error.parts[1]) from None
    except BrokenFile as error:
        raise _corrupt(file, str(error)) from None
    if end > size:
        raise _truncated(file, size, end)
    return entries


def _entry(name: str, file: Path, data: int, place: object) -> TensorEntry:
    """Raises BrokenFile for what the format does not allow."""
    if not isinstance(place, dict) or not {"dtype", "shape", "data_offsets"} <= place.keys():
        raise BrokenFile(f"{name} lacks a type, shape or place")
    code, shape, offsets = place["dtype"], place["shape"], place["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise BrokenFile(f"{name} has the type {code!r}, which there is not")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > MOST_DIMENSIONS:
        raise BrokenFile(f"{name} has a shape or place that is none")
    begin, end = offsets
    if 8 * (end - begin) != BITS[code] * math.prod(shape):
        raise BrokenFile(f"{name} has {end - begin:,} bytes, which is not what its shape {shape} of {code} needs")
    return TensorEntry(name, file, FLOATS.get(code, code), tuple(shape), data + begin, end - begin)


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LARGEST for value in values)


def _corrupt(file: Path, reason: str) -> UserError:
    return UserError(file, f"is not a safetensors file: its header is corrupt ({reason})", "download it again")


def _truncated(file: Path, size: int, end: int) -> UserError:
    return UserError(file, f"truncated: {size} bytes, but its header says {end}", "download it again")

"""Arrays in files that others wrote: numeric ones alone, and no more of them than memory is meant for."""

import base64
import io
import zipfile
from pathlib import Path

import numpy as np

from suture.core.reader import open_regular
from suture.core.refusals import BrokenFile, refusals

LIMIT = 8 << 30  # bytes of all arrays of a file; what is compressed in it may be a thousand times its size


def read_npz(path: Path, what: str, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. Raises UserError, which says that it is no `what`, for anything else."""
    with open_regular(path, remedy) as file, refusals(path, f"is not a {what}", remedy):
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LIMIT:
            raise BrokenFile(f"holds {size:,} bytes of arrays; at most {LIMIT:,} are read")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found = dict(arrays)
        except MemoryError:  # of an array that says to be far larger than its bytes
            raise BrokenFile("holds an array that is larger than this machine's memory") from None
        if odd := next((name for name, value in found.items() if not isinstance(value, np.ndarray)), None):
            raise BrokenFile(f"is not a {what} ({odd[:60]!r} in it is no array)")
        return found


def from_base64(text: str) -> np.ndarray:
    """An array in numpy's own format, as Polygraphy puts it into JSON. Its decoder would read archives and pickled tensors of
    PyTorch's, too. Raises ValueError."""
    return np.lib.format.read_array(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)

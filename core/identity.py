"""What a stage's results depend on: the content of the files that it reads, and the code and libraries that read them.

A file's content is its SHA-256. A large file is not hashed again while its size, times and inode are those of the last
time, which manifests record: 15 GB of weights are read for this once, by the first stage that reads them.
"""

import hashlib
import importlib.metadata
import importlib.resources
import os
import time
from contextlib import ExitStack
from pathlib import Path

from suture.core.errors import UserError
from suture.core.manifest import read_manifest
from suture.core.progress import shown
from suture.core.reader import open_regular

SOURCE_NAMES = ("*.py", "*.txt", "*.j2")  # code, the text that comes with it, and templates
PACKAGES = (
    "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "tensorrt", "tensorrt-rtx", "torch", "transformers",
)  # fmt: skip
LARGE = 1 << 24  # bytes; below, hashing takes no longer than a clock's tick, within which a change leaves no trace
BLOCK = 1 << 20  # bytes read at once
PATIENCE = 2.0  # seconds of hashing that go unmentioned


class Contents:
    """Hashes of files. `title` names the stage where hashing takes long enough to say so."""

    def __init__(self, title: str):
        self.title, self.spent = title, 0.0
        self._known: dict[str, dict] = {}  # by real path

    def learn(self, folder: Path) -> None:
        """Takes over the hashes that the manifest in `folder` records, of what its stage read and wrote."""
        recorded = (read_manifest(folder) or {}).get("content")
        for name, entry in recorded.items() if isinstance(recorded, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and "\0" not in name:
                self._known[os.path.realpath(folder / name)] = entry

    def of(self, path: Path) -> dict:
        """sha256, size, mtime_ns, ctime_ns and inode of a file. Raises UserError where it is not a regular file."""
        real = os.path.realpath(path)
        with open_regular(path) as file:
            seen = _stats(file.fileno())
            known = self._known.get(real)
            if known is None or seen["size"] < LARGE or any(known.get(key) != value for key, value in seen.items()):
                self._known[real] = {"sha256": self._hash(file, path, seen["size"]), **seen}
                if _stats(file.fileno()) != seen:
                    raise UserError(path, "changed while it was read", "run this again when nothing writes there")
        return self._known[real]

    def moved(self, source: Path, target: Path, sha256: str) -> dict:
        """The same for a file that was hashed as `source` and is now `target`: renaming changes one of its times."""
        with open_regular(target) as file:
            self._known[os.path.realpath(target)] = entry = {"sha256": sha256, **_stats(file.fileno())}
        self._known.pop(os.path.realpath(source), None)
        return entry

    def _hash(self, file, path: Path, size: int) -> str:
        digest, block, done, show = hashlib.sha256(), memoryview(bytearray(BLOCK)), 0, None
        started = time.monotonic()
        with ExitStack() as stack:
            while count := file.readinto(block):
                digest.update(block[:count])
                done += count
                if show is None and self.spent + time.monotonic() - started > PATIENCE:
                    show = stack.enter_context(shown(self.title))
                if show is not None:
                    show(f"hashing {path.name}", min(done / max(size, 1), 1.0))
        self.spent += time.monotonic() - started
        return digest.hexdigest()


def versions(package: str) -> dict[str, str]:
    """Of the libraries that stages compute with, and as `code` a hash of the sources of the stage `package`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "code": _code(package)}


def _code(package: str) -> str:
    """A changed pass makes old results stale."""
    digest = hashlib.sha256()
    for part in ("core", "models", "runtime", package):
        try:
            folder = Path(str(importlib.resources.files(f"suture.{part}")))
        except ModuleNotFoundError:
            folder = Path(part)
        files = sorted(path for pattern in SOURCE_NAMES for path in folder.rglob(pattern))
        if not files:
            raise RuntimeError(f"{folder} has no sources, so nothing says which code made the results")
        for path in files:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _stats(descriptor: int) -> dict[str, int]:
    found = os.fstat(descriptor)
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}

"""A stage's run: whether its results still hold, outputs that appear by rename, and a manifest that says how they came."""

import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contracts.errors import UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # what a run writes into until all of it is there
SOURCES = Path(__file__).resolve().parent.parent
PACKAGES = (
    "onnx", "onnx-graphsurgeon", "onnxruntime", "polygraphy", "tensorrt", "tensorrt-rtx", "torch", "transformers",
)  # fmt: skip


class Stage:
    """One run of the stage `name` that reads `inputs` with `options` and writes into the folder `out`.

    stage = Stage("surgery", out, inputs=[model], options={"capacity": 2048})
    if stage.up_to_date() and not force: return
    with stage.writing() as folder:
        (folder / "report.json").write_text(...)
        stage.extra["weights_root"] = "."
    """

    def __init__(self, name: str, out: Path, inputs: list[Path], options: dict):
        self.name, self.out = name, Path(out)
        self.inputs = [Path(path) for path in inputs]
        self.extra: dict = {}
        self.identity = {
            "stage": name,
            "options": json.loads(json.dumps(options, default=str)),
            "inputs": {os.path.relpath(path, self.out): fingerprint(path) for path in self.inputs},
            "versions": {**_versions(), "code": _code(name)},
        }

    def up_to_date(self) -> bool:
        """True if the results in `out` came from the same inputs, options and versions, and are all still there."""
        manifest = read_manifest(self.out)
        return (
            manifest is not None
            and all(manifest.get(key) == value for key, value in self.identity.items())
            and all(_size(self.out / name) == size for name, size in manifest["outputs"].items())
        )

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yields an empty folder; what is in it at the end moves into `out`. On an error, nothing moves."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(self.out, "is a file", "name a folder with --out")
        partial = self.out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.monotonic()
        try:
            yield partial
            files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            manifest = {
                **self.identity,
                **self.extra,
                "outputs": {str(name): (partial / name).stat().st_size for name in files},
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": peak_memory(),
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            (self.out / MANIFEST).unlink(missing_ok=True)  # killed between two renames: the next run starts again
            for name in [*files, Path(MANIFEST)]:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / name, self.out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a stage's results, or None where no finished run left one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and "outputs" in manifest else None


def fingerprint(path: Path) -> dict:
    """What tells whether an input changed: a hash for graphs and configs; size, time and header hash for weights."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(path, "no such file", "check the path") from None
    if path.is_dir():
        raise UserError(path, "is a folder", "name a file")
    if path.suffix == ".safetensors":
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "header_sha256": _header_hash(path)}
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def peak_memory() -> int:
    """Bytes: the largest resident set that this process or one of its finished children had (mapped files included)."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _header_hash(path: Path) -> str:
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(struct.unpack("<Q", length)[0], 100_000_000)) if len(length) == 8 else b""
    return hashlib.sha256(header).hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _code(stage: str) -> str:
    """A hash of the stage's own sources: a changed pass makes old results stale."""
    digest = hashlib.sha256()
    for package in ("contracts", "models", "runtime", stage):
        for path in sorted((SOURCES / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None

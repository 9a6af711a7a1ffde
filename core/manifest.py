"""manifest.json: what a finished stage has written into its folder, from what, and how. Who reads results asks it."""

import resource
from pathlib import Path, PurePosixPath

from suture.core.errors import UserError
from suture.core.reader import read_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # what a run writes into until all of it is there
FIELDS: dict[str, tuple[type, ...]] = {  # of a manifest, where they are there
    "stage": (str,), "options": (dict,), "inputs": (dict,), "versions": (dict,), "outputs": (dict,), "content": (dict,),
    "seconds": (int, float), "peak_memory_bytes": (int,), "nodes": (int,), "verdict": (str,),
}  # fmt: skip
LONGEST_NAME, LONGEST_PATH = 255, 2048  # bytes, characters; what no file of ours is called, nobody can have written
MOVING = ".moving.json"  # in PARTIAL: the stage, and the files that are its own, while they are moved to their places


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a stage's results, or None where no finished run left one: what lies there may be anything."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return None
    usable = "outputs" in manifest and all(type(manifest.get(key)) in (*kinds, type(None)) for key, kinds in FIELDS.items())
    return manifest if usable and all(type(size) is int for size in manifest["outputs"].values()) else None


def recorded_option(folder: Path, name: str, kind: type = str):
    """What a stage's last run in `folder` was given for an option, or None where the manifest has nothing of that type."""
    value = ((read_manifest(folder) or {}).get("options") or {}).get(name)
    return value if isinstance(value, kind) else None


def recorded_folder(folder: Path, name: str) -> Path | None:
    """The same for a folder that is still there."""
    value = recorded_option(folder, name)
    return Path(value) if value and "\0" not in value and Path(value).is_dir() else None


def recorded_file(folder: Path, name: str) -> Path | None:
    """The file `name` that a finished stage wrote into `folder`, whether it is still there or not, or None where its last
    run wrote none: what lies there besides is an earlier run's. Where no stage has left a manifest, a file that somebody
    has put there."""
    path = folder / name
    if (folder / MANIFEST).exists():
        return path if name in (read_manifest(folder) or {"outputs": {}})["outputs"] else None
    return path if path.is_file() and not (folder / PARTIAL / MOVING).exists() else None


def result(folder: Path, name: str) -> Path | None:
    """The same, or None where the file is gone."""
    path = recorded_file(folder, name)
    return path if path is not None and path.is_file() else None


def own_names(found: dict | None) -> set[str]:
    """The files that a manifest lists, as far as they are names of files below its folder."""
    names = (found or {}).get("outputs", ())
    return {name for name in names if isinstance(name, str) and is_below(name)}


def hashes(found: dict | None) -> dict[str, str]:
    """The SHA-256 of each file that a manifest lists, as its stage read or wrote it."""
    content = (found or {}).get("content")
    entries = content.items() if isinstance(content, dict) else ()
    return {
        name: entry["sha256"] for name, entry in entries if isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
    }


def is_below(name: str) -> bool:
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return (
        inside and len(name) <= LONGEST_PATH and all(len(part.encode(errors="replace")) <= LONGEST_NAME for part in path.parts)
    )


def remove(folder: Path, names: set[str]) -> None:
    """Removes these files below the folder, and the folders that are then empty; follows no link out of it."""
    parents = set()
    for name in names:
        path = folder / name
        if path.parent.resolve().is_relative_to(folder.resolve()) and (path.is_file() or path.is_symlink()):
            path.unlink()
            parents |= {parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)}
    for parent in sorted(parents, reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()


def remove_results(folder: Path, stage: str) -> None:
    """Removes what `stage` has written into the folder, where it has; what else lies there stays."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.get("stage") == stage:
        remove(folder, own_names(manifest) | {MANIFEST})
        if not any(folder.iterdir()):
            folder.rmdir()


def peak_memory() -> int:
    """Bytes: the largest resident set that this process or one of its finished children had (mapped files included)."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

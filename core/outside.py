"""Weights outside their graph's own folder, under the `weights_root` that the manifest beside it records.

Anybody can write a manifest, so that a folder is named there says nothing. A file outside is read as weights only if it is a safetensors
file, which is what a checkpoint has and nothing else looks like, or if the manifest has the hash of its content: who wrote that has read it.
"""

import struct
from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.identity import Contents
from suture.core.manifest import hashes, read_manifest
from suture.core.reader import open_regular
from suture.core.safetensors_header import read_header
from suture.core.tensors import references


def check_outside(proto: onnx.ModelProto, model: Path, root: Path) -> None:
    """Raises UserError where a tensor of the graph in file `model` lies below `root` and not below the graph's own folder, in a
    file that is neither: one that the manifest lists and that has changed since, too."""
    own = model.parent.resolve()
    begins: dict[str, int] = {}
    for _, reference in references(proto):
        location = reference["location"]
        if not (root / location).resolve().is_relative_to(own):
            begins[location] = min(begins.get(location, 1 << 63), int(reference.get("offset", 0)))
    others = [location for location, offset in begins.items() if not _is_safetensors(root / location, offset)]
    if not others:
        return
    recorded, contents = hashes(read_manifest(model.parent)), Contents("weights")
    contents.learn(model.parent)
    known = {(model.parent / name).resolve(): sha for name, sha in recorded.items()}
    for path in map(root.joinpath, others):
        if (sha := known.get(path.resolve())) is None:
            reason = f"weights at {path} lie outside {model.parent}, and its manifest does not know that file"
            raise UserError(model, reason, "keep weights below the model's own folder")
        if contents.of(path)["sha256"] != sha:
            raise UserError(path, f"has changed since {model} was made with it", "make that again")


def _is_safetensors(path: Path, begin: int) -> bool:
    """Whether the file is one whose tensors begin at or before the byte `begin`."""
    with open_regular(path) as file:
        prefix = file.read(8)
    if len(prefix) < 8 or begin < 8 + struct.unpack("<Q", prefix)[0]:
        return False
    try:
        return bool(read_header(path))
    except UserError:
        return False

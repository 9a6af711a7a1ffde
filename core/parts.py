"""A pipeline's folder by the parts of its model: each a graph that goes through the stages on its own.

    one part        OUT/export  OUT/surgery  OUT/build
    several         OUT/PART/export  OUT/PART/surgery  OUT/PART/build  ..., and OUT/parts.json, written by export

parts.json lists them in the order in which they are called: {"parts": [{"name", "kind", "inputs", "outputs"}, ...]}. An input
or output is {"shape": sizes and names of axes, "dtype": ONNX's name}; an input also has "below" where it is an integer below
that, and "from": "PART/OUTPUT" where it is an output of a part before. The manifest of a part's export has the same of it
alone, as "part".
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from suture.core.errors import UserError
from suture.core.manifest import read_manifest, recorded_file
from suture.core.reader import read_json

PARTS = "parts.json"
STAGE = "export.parts"  # as the manifest beside parts.json has it
DECODER, GRAPH = "decoder", "graph"  # kinds: a step with a KV cache; any other graph, which has neither cache nor steps
KINDS = (DECODER, GRAPH)
REMEDY = "export the checkpoint again"


@dataclass(frozen=True)
class PartFolder:
    """Where the results of one part lie."""

    name: str
    kind: str
    folder: Path  # that holds export/, surgery/ and build/
    inputs: dict[str, dict] = field(default_factory=dict)
    outputs: dict[str, dict] = field(default_factory=dict)

    def source(self, name: str) -> str | None:
        """The part whose output the input is, if it is one's."""
        return str(self.inputs.get(name, {}).get("from", "")).partition("/")[0] or None


def find_parts(out: Path) -> tuple[PartFolder, ...]:
    """The parts of the pipeline's folder `out`, in order. Raises UserError for a list of them that cannot be read."""
    path = recorded_file(out, PARTS)
    if path is None:
        described = (read_manifest(out / "export") or {}).get("part")
        return (PartFolder("decoder", DECODER, out) if described is None else _part(described, out / "export", out),)
    listed = read_json(path).get("parts")
    parts = tuple(_part(each, path) for each in listed) if isinstance(listed, list) else ()
    if not parts or len({part.name for part in parts}) < len(parts):
        raise UserError(path, "does not list the parts of a model", REMEDY)
    return parts


def _part(described: object, where: Path, folder: Path | None = None) -> PartFolder:
    try:
        if not isinstance(described, dict):
            raise TypeError
        name, kind = described["name"], described["kind"]
        ends = [*described["inputs"].values(), *described["outputs"].values()]
        usable = re.fullmatch(r"[a-z][a-z0-9_]*", name) and kind in KINDS and all(isinstance(each, dict) for each in ends)
        part = PartFolder(name, kind, folder or where.parent / name, dict(described["inputs"]), dict(described["outputs"]))
    except (TypeError, LookupError, ValueError, AttributeError):
        usable = False
    if not usable:
        raise UserError(where, f"describes no part of a model: {str(described)[:60]}", REMEDY)
    return part

"""Kind 9: results of an earlier run that the last one has not written: gone, or not used; what is nobody's stays."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.abuse.case import CUTTERS, FINISHED, NO_TRACE, Case, untrue

PROMISE = "what an earlier run wrote and this one does not is removed, and nothing that somebody else put there"
STAGES = {
    "export": "--force", "surgery": "--skip=swish", "build": "--profiles=one", "validate": "--seed=3",
    **dict.fromkeys(CUTTERS, "--force"),
}  # fmt: skip
NAMES = (
    "model.ort.onnx", "encoder.onnx", "quantised.data", "repacked.data", "earlier.svg", "sub/folder/deep.bin", "a name with spaces",
    "\N{GREEK SMALL LETTER ALPHA}.onnx", "-rf", ".hidden",
)  # fmt: skip
ELSEWHERE = (  # what a manifest may list, and is not a result
    "../secret", "{work}/secret", "link/secret", "../graphs/model.data", "/etc/hostname", "..", ".", "", "sub/../../secret",
    "link/../../secret", "manifest.json", ".partial/.lock", "\0", "n" * 300, "link",
)  # fmt: skip


def listed(name: str) -> Callable[[Path], None]:
    """A file of an earlier run's."""

    def damage(work: Path) -> None:
        path = work / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("stale")
        _list(work, name)

    return damage


def unlisted(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        path = work / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")

    return damage


def outside(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        (work / "out" / "link").symlink_to("..")
        _list(work, name.format(work=work))

    return damage


def _list(work: Path, name: str) -> None:
    path = work / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"][name] = 5
    path.write_text(json.dumps(manifest))


def removed(name: str) -> Callable[[Path], str | None]:
    return lambda work: f"{name} is still there" if (work / "out" / name).exists() else untrue(work / "out")


def stays(name: str) -> Callable[[Path], str | None]:
    return lambda work: None if (work / "out" / name).read_text() == "mine" else f"{name} has changed"


CASES = [
    *(Case(9, stage, f"{name} of a run before", PROMISE, listed(name), expected=(0,), finished=True, after=removed(name),
           fault=NO_TRACE if stage == "export" else None, more=(*FINISHED.get(stage, ()), option))
      for stage, option in STAGES.items() for name in NAMES),
    *(Case(9, stage, f"{name} of somebody", PROMISE, unlisted(name), expected=(0,), finished=True, after=stays(name),
           fault=NO_TRACE if stage == "export" else None, more=(*FINISHED.get(stage, ()), option))
      for stage, option in STAGES.items() for name in NAMES),
    *(Case(9, stage, f"{name} in the list", PROMISE, outside(name), expected=(0, 2), finished=True,
           fault=NO_TRACE if stage == "export" else None, more=(*FINISHED.get(stage, ()), option))
      for stage, option in STAGES.items() for name in ELSEWHERE),
]  # fmt: skip

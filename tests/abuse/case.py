"""One abuse of one stage, and what must hold after it whatever the abuse is."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

UNUSABLE, FAULT = (2,), (3,)


@dataclass(frozen=True)
class Case:
    """`damage(folder)` is done to a copy of the good inputs; then the stage runs on it."""

    kind: int  # 1 to 13, as the tables are called
    stage: str
    name: str
    promise: str
    damage: Callable[[Path], None]
    says: str = ""  # words of the error's line
    expected: tuple[int, ...] = UNUSABLE  # exit statuses
    arguments: tuple[str, ...] = ()  # instead of the stage's own; {work} is the folder
    more: tuple[str, ...] = ()  # beside them
    seconds: float = 60  # until it is a hang
    finished: bool = False  # the stage has run before on the good inputs, and left its results
    prints: str = ""  # words on standard output
    prints_not: str = ""  # words that must not be there
    fault: tuple[str, str] | None = None  # module:name of what raises this exception once it is called
    ended: tuple[str, int] | None = None  # of the pipeline: a stage, and the status that it seems to end with
    stdout: str = ""  # "closed", "full", or "unread": a pipe that nobody reads
    environment: tuple[tuple[str, str], ...] = ()
    after: Callable[[Path], str | None] = lambda work: None  # what is wrong in the folder then
    quick: bool = True  # else it is none of those that the suite itself runs
    writes: str = ""  # the folder that the stage may write, where it is not its own

    @property
    def out(self) -> str:
        return self.writes or OUTS.get(self.stage, "out")

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.stage}-{self.name}".replace(" ", "_")

    def command(self, work: Path) -> list[str]:
        return [argument.replace("{work}", str(work)) for argument in (*(self.arguments or ARGUMENTS[self.stage]), *self.more)]


ARGUMENTS = {
    "export": ("--checkpoint", "{work}/checkpoint", "--out", "{work}/out"),
    "surgery": ("{work}/graphs/model.onnx", "--out", "{work}/out", "--capacity", "8"),
    "build": ("{work}/graphs/model.onnx", "--out", "{work}/out"),
    "validate": ("{work}/graphs/model.onnx", "{work}/graphs/model.onnx"),
    "generate": ("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--prompt", "ab", "--max-tokens", "2"),
    "serve": ("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--port", "0"),
    "convert": ("{work}/checkpoint/model.bin", "{work}/out"),
    "check": ("{work}/graphs/model.onnx",),
    "compare": ("{work}/graphs/model.onnx", "{work}/graphs/model.onnx"),
    "golden": ("{work}/pipeline", "--golden", "{work}/golden"),
    "bundle": ("{work}/bundled", "--import", "{work}/bundled/results.npz"),
    "surgery.join": ("{work}/pair/model.onnx", "{work}/pair/second.onnx", "--out", "{work}/out"),
    "surgery.once": ("{work}/pair/model.onnx", "--once", "t", "--out", "{work}/out"),
    "surgery.capacity": ("{work}/static/model.onnx", "--capacity", "4", "--out", "{work}/out"),
    "surgery.ranks": ("{work}/static/model.onnx", "--tensor-parallel", "2", "--no-verify", "--out", "{work}/out"),
    "pipeline": ("--checkpoint", "{work}/checkpoint", "--out", "{work}/out"),
    "export.networks": ("--checkpoint", "{work}/sd", "--out", "{work}/out"),
    "export.masks": ("--checkpoint", "{work}/sam", "--out", "{work}/out"),
    "generate.picture": ("{work}/drawn", "--checkpoint", "{work}/sd", "--prompt", "a circle", "--control", "{work}/given.png",
                         "--picture", "{work}/out/made.png", "--steps", "2"),
    "generate.mask": ("{work}/masked", "--checkpoint", "{work}/sam", "--picture", "{work}/given.png", "--point", "3,4",
                      "--mask", "{work}/out/made.png", "--runtime", "cpu"),
    "convert.like": ("{work}/single.ckpt", "{work}/out/networks", "--like", "{work}/sd"),
}  # fmt: skip
OUTS = {"bundle": "bundled/validate"}  # what a stage writes, else "out"
FINISHED = {"validate": ("--out", "{work}/out")}  # what makes it leave results
MODULES = {
    "convert": "suture.models.convert",
    "check": "suture.validate.check_command",
    "compare": "suture.validate.compare_command",
    "golden": "suture.validate.__main__",
    "bundle": "suture.validate.__main__",
    "surgery.join": "suture.surgery.join",
    "surgery.once": "suture.surgery.__main__",
    "surgery.capacity": "suture.surgery.capacity",
    "surgery.ranks": "suture.surgery.ranks",
    "pipeline": "suture.pipeline",
    "export.networks": "suture.export.__main__",
    "export.masks": "suture.export.__main__",
    "generate.picture": "suture.generate.__main__",
    "generate.mask": "suture.generate.__main__",
    "convert.like": "suture.models.convert",
}
PROGRAMS = {
    "golden": "validate",
    "bundle": "validate",
    "surgery.once": "surgery",
    "export.networks": "export",
    "export.masks": "export",
    "generate.picture": "generate",
    "generate.mask": "generate",
    "convert.like": "convert",
}  # what a stage calls itself, where its module has several
SAID = {
    "serve": 2
}  # lines before the last: where it listens and what state it is in; of any other stage one, as generate's what it runs
DONE: dict[str, tuple[int, ...]] = {}  # what a stage ends with on the good inputs, where that is not 0
FOLDERS = {
    "surgery.capacity": "static",
    "surgery.ranks": "static",
    "surgery.join": "pair",
    "surgery.once": "pair",
}  # of a stage's graph, else "graphs"
CUTTERS = ("surgery.capacity", "surgery.ranks", "surgery.join", "surgery.once")  # surgery's other commands
NO_TRACE = ("suture.export.stage:trace", "QUICK")  # the tracer takes 14 s of processor time, and is not what is tested
SECOND = ("{work}/pair/second.onnx", "{work}/pair/model.onnx", "--out", "{work}/out")  # of surgery.join: the damaged graph
PICTURED = ("export.networks", "export.masks", "generate.picture", "generate.mask", "convert.like")  # good_pictures are theirs
GRAPH_STAGES = ("surgery", "build", "validate", "generate", "check", "compare")


def folder_of(stage: str) -> str:
    return FOLDERS.get(stage, "graphs")


@dataclass(frozen=True)
class Result:
    status: int | None  # None: it hung and was killed
    out: str
    err: str
    cpu: float  # seconds of processor time, of its children too


def broken_promises(case: Case, result: Result, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What must hold after any case, and does not. `before` and `after`: the contents of its folder."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    found = []
    if result.status is None:
        found.append(f"hung for {case.seconds} s")
    elif result.status not in case.expected:
        found.append(f"status {result.status}, not {case.expected}")
    if "Traceback" in result.err + result.out:
        found.append("a traceback")
    if result.status in (*UNUSABLE, *FAULT) and not case.ended:
        program = PROGRAMS.get(case.stage, case.stage)
        if not lines or not lines[-1].startswith((f"{program}: ", f"python -m {program}: ", f"suture {program}: ")):
            found.append("the last line of standard error does not say what is wrong")
        elif case.says not in lines[-1]:
            found.append(f"its line does not say {case.says!r}")
        if len(lines) > 1 + SAID.get(case.stage, 1):
            found.append(f"{len(lines)} lines on standard error")
    if case.prints not in result.out:
        found.append(f"standard output does not say {case.prints!r}")
    if case.prints_not and case.prints_not in result.out:
        found.append(f"standard output says {case.prints_not!r}")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    ours = [name for name in changed if name == case.out or name.startswith(f"{case.out}/")]
    if others := sorted(set(changed) - set(ours)):
        found.append(f"changed outside --out: {', '.join(others)}")
    written = [name for name in ours if before.get(name, FOLDER) != FOLDER or after.get(name, FOLDER) != FOLDER]
    if written and result.status in (*UNUSABLE, *FAULT):
        found.append(f"changed in --out, and nothing was done: {', '.join(written)}")
    return found


FOLDER = "a folder"


def contents(work: Path) -> dict[str, str]:
    """What lies in the folder: each file's hash, and of what is none its kind."""
    found = {}
    for folder, folders, files in os.walk(work):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(work))] = f"a link to {os.readlink(path)}"
            elif stat.S_ISREG(mode) and path.stat().st_size < 1 << 28:
                found[str(path.relative_to(work))] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(work))] = FOLDER if stat.S_ISDIR(mode) else str(mode)
    return found


def untrue(out: Path) -> str | None:
    """What a manifest says that is not so: of a file that its stage read or wrote."""
    manifest = json.loads((out / "manifest.json").read_text())
    for name, entry in manifest["content"].items():
        path = out / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            return f"the manifest is not true of {name}"
    here = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return f"no file for {sorted(manifest['outputs'].keys() - here)}" if manifest["outputs"].keys() - here else None

"""One abuse of one stage, and what must hold after it whatever the abuse is."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

UNUSABLE = (2,)


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
    seconds: float = 60  # until it is a hang

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.stage}-{self.name}".replace(" ", "_")

    def command(self, work: Path) -> list[str]:
        return [argument.format(work=work) for argument in self.arguments or ARGUMENTS[self.stage]]


ARGUMENTS = {
    "export": ("--checkpoint", "{work}/checkpoint", "--out", "{work}/out"),
    "surgery": ("{work}/graphs/model.onnx", "--out", "{work}/out", "--capacity", "8"),
    "build": ("{work}/graphs/model.onnx", "--out", "{work}/out"),
    "validate": ("{work}/graphs/model.onnx", "{work}/graphs/model.onnx"),
    "generate": ("{work}/graphs/model.onnx", "--checkpoint", "{work}/library", "--prompt", "ab", "--max-tokens", "2"),
    "convert": ("{work}/checkpoint/model.bin", "{work}/out"),
}
MODULES = {"convert": "suture.models.convert"}
GRAPH_STAGES = ("surgery", "build", "validate", "generate")


@dataclass(frozen=True)
class Result:
    status: int | None  # None: it hung and was killed
    out: str
    err: str
    seconds: float


def broken_promises(case: Case, result: Result, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What must hold after any case, and does not."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    found = []
    if result.status is None:
        found.append(f"hung for {case.seconds} s")
    elif result.status not in case.expected:
        found.append(f"status {result.status}, not {case.expected}")
    if "Traceback" in result.err + result.out:
        found.append("a traceback")
    if result.status == UNUSABLE[0]:
        if not lines or (not lines[-1].startswith(f"{case.stage}: ") and not lines[-1].startswith(f"python -m {case.stage}: ")):
            found.append("the last line of standard error does not say what is wrong")
        elif case.says not in lines[-1]:
            found.append(f"its line does not say {case.says!r}")
        if len(lines) > 2:  # generate says first what it runs
            found.append(f"{len(lines)} lines on standard error")
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        found.append(f"changed outside --out: {', '.join(changed)}")
    return found


def contents(work: Path) -> dict[str, str]:
    """What lies in the folder, --out left out: each file's hash, and of what is none its kind."""
    found = {}
    for folder, folders, files in os.walk(work):
        if Path(folder) == work and "out" in folders:
            folders.remove("out")
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            whole = stat.S_ISREG(mode) and path.stat().st_size < 1 << 28
            found[str(path.relative_to(work))] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else str(mode)
    return found

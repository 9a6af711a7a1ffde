"""Kind 8: two runs into one --out: the second ends with one line, and what the first has written stays whole."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from tests.abuse.case import ARGUMENTS, CUTTERS, FINISHED, NO_TRACE, Case

PROMISE = "one run at a time writes into a folder; another one says in one line which process does"
STAGES = ("export", "surgery", "build", "validate", *CUTTERS)
HELD: list[int] = []  # for as long as these tests run
OWNERS = {
    "another process": b"%d" % os.getpid(), "one that does not say who": b"", "a word": b"nobody", "a long number": b"9" * 9999,
    "a negative number": b"-1", "no text": b"\xff\xfe", "two lines": b"1\n2", "zero": b"0",
    "a number in hexadecimal": b"0x1", "zeros": bytes(100), "spaces": b"  ", "a fraction": b"1.5", "much": b"1" * (1 << 20),
}  # fmt: skip
LEFT = {  # beside the lock: what the run that holds it has got to
    "nothing": lambda partial: None,
    "half a result": lambda partial: (partial / "model.onnx").write_bytes(b"half"),
    "half a list of what moves": lambda partial: (partial / ".moving.json").write_text('{"outputs": []'),
}


def held(owner: bytes, left: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        partial = work / "out" / ".partial"
        partial.mkdir(parents=True)
        left(partial)
        descriptor = os.open(partial / ".lock", os.O_RDWR | os.O_CREAT)
        os.write(descriptor, owner)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        HELD.append(descriptor)

    return damage


def left_behind(owner: bytes) -> Callable[[Path], None]:
    """By a run that was killed: nobody holds it."""

    def damage(work: Path) -> None:
        (work / "out" / ".partial").mkdir(parents=True)
        (work / "out" / ".partial" / ".lock").write_bytes(owner)
        (work / "out" / ".partial" / "model.onnx").write_bytes(b"half")

    return damage


def tidy(work: Path) -> str | None:
    return "the killed run's files are still there" if (work / "out" / ".partial").exists() else None


CASES = [
    *(Case(8, stage, f"{owner}, {what}", PROMISE, held(OWNERS[owner], left), "is writing there", arguments=ARGUMENTS[stage],
           more=FINISHED.get(stage, ())) for stage in STAGES for owner in OWNERS for what, left in LEFT.items()),
    *(Case(8, stage, f"{owner}, killed", PROMISE, left_behind(OWNERS[owner]), expected=(0,), after=tidy, more=FINISHED.get(stage, ()),
          fault=NO_TRACE if stage == "export" else None) for stage in STAGES if stage != "build" for owner in OWNERS),
]  # fmt: skip

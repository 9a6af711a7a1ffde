"""How a stage's command line behaves: one line for bad input, and the exit status that design and CI rely on.

0: done. 1: a check found a difference. 2: unusable input or arguments, or a machine that has too little. 3: a fault of
ours, or a stage killed by a signal. 130: interrupted. docs/exit_status.md says more.

Run as a program, `python -m suture.core.command STAGE ...` is `python -m STAGE ...` whose imports count as its work, too:
by itself Python would end with status 1 where one fails.
"""

import argparse
import ctypes
import errno
import os
import re
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from suture.core import streams
from suture.core.errors import UserError, one_line

DONE = 0
FOUND_DIFFERENCE = 1
UNUSABLE_INPUT = 2
FAULT = 3
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it
GIVEN = "_given"  # in a namespace: the options that the command line has
PR_SET_PDEATHSIG = 1  # of Linux's prctl
NO_MEMORY = "can.t allocate memory|bad_alloc|bad allocation"  # in torch's and onnxruntime's words
REMEDIES = {  # by what an OSError says
    "ENOSPC": "free some, or choose another --out",
    "EDQUOT": "free some, or choose another --out",
    "EFBIG": "raise the limit of a file's size (ulimit -f), or choose another --out",
    "EACCES": "choose a place that can be written, or a file that can be read",
    "EPERM": "choose a place that can be written",
    "EROFS": "choose a place that can be written",
    "EISDIR": "name a file",
    "ENOTDIR": "name a folder",
    "EEXIST": "name a folder",
    "ENOENT": "check the path",
    "ENAMETOOLONG": "choose a shorter name",
    "ELOOP": "name what its links should lead to",
    "ENOMEM": "free memory",
    "EMFILE": "raise the limit of open files (ulimit -n)",
}

FULL = ("ENOSPC", "EDQUOT", "EFBIG")


class CommandParser(argparse.ArgumentParser):
    """argparse, but a wrong argument gets one line instead of the usage, and so does a value that another one replaces:
    what is given counts, or is refused."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        for kind in (None, "store"):
            self.register("action", kind, _Once)

    def error(self, message: str):
        sys.exit(_say(self.prog, f"{message}; see {self.prog} --help", UNUSABLE_INPUT))


class _Once(argparse._StoreAction):
    """Stores a value, and that it was given: where an option has no effect, its default is no reason to refuse it."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values == [] and self.nargs in (None, "+"):  # argparse makes this of --option=--
            parser.error(f"argument {option_string}: expected one argument")
        seen = namespace.__dict__.setdefault(GIVEN, set())
        if self.option_strings and self.dest in seen:
            parser.error(f"{option_string} is given twice")
        seen.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


def given(options: argparse.Namespace, name: str) -> bool:
    """Whether the command line has this option (by its name in the namespace), even with its default's value."""
    return name in vars(options).get(GIVEN, ())


def run(prog: str, main: Callable[[], int | None], result_on_stdout: bool = False) -> None:
    """Runs `main` and ends the process with the exit status that its outcome means.

    `result_on_stdout`: what it prints there is its result, and it is done when nobody reads that any more.
    """
    streams.standardise(result_on_stdout)
    status = outcome(prog, main)
    if failure := streams.flush():
        status = status or _said(prog, failure, result_on_stdout)
    sys.exit(status)


def outcome(prog: str, main: Callable[[], int | None], result_on_stdout: bool = True) -> int:
    """The exit status that what `main` returns or raises means. Says why on standard error."""
    try:
        _refuse_names(sys.argv)
        return main() or DONE
    except SystemExit as ended:  # argparse's
        return ended.code if isinstance(ended.code, int) else DONE if ended.code is None else FAULT
    except BaseException as error:
        return _said(prog, error, result_on_stdout)


def _said(prog: str, error: BaseException, result_on_stdout: bool) -> int:
    """Says on one line what was raised, and returns its exit status."""
    if isinstance(error, UserError):
        return _say(prog, str(error), UNUSABLE_INPUT)
    if isinstance(error, KeyboardInterrupt):
        return _say(prog, "interrupted; run the same command again to carry on", INTERRUPTED)
    if isinstance(error, BrokenPipeError) and result_on_stdout:
        return DONE
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):  # which is between processes of ours
        return _say(prog, _of_the_system(error), UNUSABLE_INPUT)
    if isinstance(error, RuntimeError) and (loop := re.fullmatch(r"Symlink loop from '(.*)'", str(error))):  # Path.resolve's
        return _say(prog, f"{loop[1]}: is a link that leads back to itself; name the file that is meant", UNUSABLE_INPUT)
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        return _say(prog, "this machine's memory is too small for it; free memory, or take a smaller input", UNUSABLE_INPUT)
    if isinstance(error, RecursionError):
        return _say(prog, "an input is nested deeper than Python can follow; check where it comes from", UNUSABLE_INPUT)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return _say(prog, f"{error.object[:200]}: is not UTF-8; rename it", UNUSABLE_INPUT)
    return _fault(prog, error)


def _of_the_system(error: OSError) -> str:
    """Where it has one, with the path that it is about."""
    if error.errno is None:  # a library's own
        return f"{error}; check that this file or folder is what it should be"
    reason = errno.errorcode.get(error.errno, "")
    path = error.filename2 or error.filename if reason in FULL else error.filename  # of a copy, what it is copied to
    where = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else "this machine"
    remedy = REMEDIES.get(reason, "correct that, and run the same command again")
    return f"{where}: {os.strerror(error.errno).lower()}; {remedy}"


def _fault(prog: str, error: BaseException) -> int:
    text = "".join(traceback.format_exception(error))
    path = Path(tempfile.gettempdir()) / f"suture-{prog}-{os.getpid()}.txt"
    command = f"{' '.join(map(ascii, sys.argv))}\nPython {sys.version}\n\n"
    try:
        path.unlink(missing_ok=True)
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(command + text)
        kept = f"report it with {path}, which says where"
    except OSError as failure:
        where = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" in {where[0].filename}:{where[0].lineno}" if where else ""
        kept = f"report it{place}; its traceback could not be kept ({failure})"
    what = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {what[0]}" if what else type(error).__name__
    return _say(prog, f"a fault of this program: {said[:500]}; {kept}", FAULT)


def _refuse_names(arguments: list[str]) -> None:
    """JSON, ONNX and HTML hold UTF-8 alone, so a path that is none could be read but not be written down."""
    for name in (*arguments[1:], os.getcwd()):
        try:
            os.fsencode(name).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(name, "is not UTF-8", "rename it, or give it in UTF-8") from None


def end_with_parent() -> None:
    """Has Linux kill this process when the one that started it ends, however that comes about: what a killed run left
    working would hold its memory, and write, while the next run does the same."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(prog: str, line: str, status: int) -> int:
    print(f"{prog}: {one_line(line)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    stage = sys.argv.pop(1)

    def stage_main() -> None:
        runpy.run_module(stage, run_name="__main__", alter_sys=True)

    run(stage.rpartition(".")[2], stage_main)

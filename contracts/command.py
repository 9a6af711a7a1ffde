"""How a stage's command line behaves: one line for bad input, and the exit status that design and CI rely on.

0: done. 1: a check found a difference. 2: unusable input or arguments.
"""

import argparse
import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable

from contracts.errors import UserError

FOUND_DIFFERENCE = 1
UNUSABLE_INPUT = 2
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument gets one line instead of the usage."""

    def error(self, message: str):
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(UNUSABLE_INPUT)


def run(prog: str, main: Callable[[], int | None]) -> None:
    """Runs `main` and ends the process with the exit status that its outcome means."""
    try:
        status = main() or 0
    except UserError as error:
        status = _say(prog, str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or "the output's disk"
            status = _say(prog, f"{where}: no space left; free some or choose another --out")
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and error.filename:
            status = _say(prog, f"{error.filename}: {error.strerror.lower()}; choose a place that can be written")
        elif error.errno == errno.EPIPE:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        else:
            raise
    except KeyboardInterrupt:
        status = _say(prog, "interrupted; run the same command again to carry on")
    sys.stdout.flush()
    sys.exit(status)


def end_with_parent() -> None:
    """Has Linux kill this process when the one that started it ends, however that comes about: what a killed run left
    working would hold its memory, and write, while the next run does the same."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(prog: str, line: str) -> int:
    print(f"{prog}: {line}", file=sys.stderr)
    return UNUSABLE_INPUT

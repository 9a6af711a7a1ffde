"""Standard input, output and error as every command has them: UTF-8 whatever the locale says, and there even where the
caller closed them (`>&-`) or reads no further (`| head`)."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def standardise(result_on_stdout: bool = False) -> None:
    """`result_on_stdout`: what a command prints there is its result, so that it ends when nobody reads it any more.

    Streams that somebody has put in the place of Python's own stay as they are."""
    _open_closed()
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    elif sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _writer(1, sys.stdout, outlives_its_reader=not result_on_stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _writer(2, sys.stderr, outlives_its_reader=True)


def flush() -> OSError | None:
    """Writes out what is still held. Returns what stopped it, after which Python's own flush at exit, which would make
    the exit status 120, finds nothing wrong."""
    failure = None
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            failure = error
            to_nowhere(number)
    return failure


def to_nowhere(number: int) -> None:
    """Lets what is written to this file descriptor from now on vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class _Stream(io.FileIO):
    """A file descriptor. With `outlives_its_reader`, what is printed after the reader has left goes nowhere, and the work
    goes on."""

    def __init__(self, number: int, outlives_its_reader: bool):
        super().__init__(number, "w", closefd=False)
        self.outlives_its_reader = outlives_its_reader

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            if not self.outlives_its_reader:
                raise
            to_nowhere(self.fileno())
            return memoryview(data).nbytes
        except OSError as error:
            error.filename = "standard output" if self.fileno() == 1 else "standard error"
            raise


def _open_closed() -> None:
    """A closed descriptor's number would go to the next file that is opened, and what is printed into that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _writer(number: int, old: io.TextIOWrapper | None, outlives_its_reader: bool) -> io.TextIOWrapper:
    if old is None:  # Python found it closed, and whatever has the number now was opened since
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError):
        old.flush()
    stream = _Stream(number, outlives_its_reader)
    buffer = stream if old.write_through else io.BufferedWriter(stream)  # python -u
    return io.TextIOWrapper(
        buffer, "utf-8", "backslashreplace", line_buffering=old.line_buffering, write_through=old.write_through
    )

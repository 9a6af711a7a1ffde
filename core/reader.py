"""Reads what others wrote: regular files alone, up to a limit, and every error with its path as one UserError.

A FIFO would wait for ever and a device has no end, so both are refused before they are opened.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from suture.core.errors import UserError

TEXT_LIMIT = 1 << 30  # bytes
JSON_LIMIT = 100 << 20  # bytes; the tokenizer.json of a large vocabulary has 40 MB
DEPTH = 100  # of lists and objects in one another
REASONS = {errno.ENOENT: "no such file", errno.ENOTDIR: "no such file", errno.EISDIR: "is a folder"}


def status(path: Path, remedy: str = "check the path") -> os.stat_result:
    """stat of a regular file, symbolic links followed. Raises UserError where it is anything else, or not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise _unreadable(path, error, remedy) from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(path, "is a folder", "name a file")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(path, "is not a regular file", "put a file in its place")
    return found


def open_regular(path: Path, remedy: str = "check the path") -> BinaryIO:
    """A regular file, opened to be read. Raises UserError as status does, and where it may not be read."""
    status(path, remedy)
    try:
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a FIFO put there since would not block
    except OSError as error:
        raise _unreadable(path, error, remedy) from None


def read_bytes(path: Path, limit: int = JSON_LIMIT, remedy: str = "check the path") -> bytes:
    """All bytes of a regular file. Raises UserError where it cannot be read, or has more than `limit`."""
    with open_regular(path, remedy) as file:
        try:  # a sparse file of a terabyte is refused at once, and one that grows meanwhile, too
            content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as error:
            raise _unreadable(path, error, remedy) from None
    if content is None or len(content) > limit:
        raise UserError(path, f"has more than {limit:,} bytes", "check that it is the file you mean")
    return content


def read_text(path: Path, remedy: str = "check the path", limit: int = TEXT_LIMIT) -> str:
    """The text in a file. Raises UserError as read_bytes does, and where it is no UTF-8."""
    try:
        return read_bytes(path, limit, remedy).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(path, "is not UTF-8", "write it again as UTF-8") from None


def read_json(path: Path, remedy: str = "check the path", limit: int = JSON_LIMIT) -> dict:
    """The object in a JSON file. Raises UserError where it is not UTF-8, not JSON, not an object, or nested too deep."""
    return parse_json(read_bytes(path, limit, remedy), path)


def parse_json(text: bytes, path: object) -> dict:
    """The object that a JSON text is; `path` names the file in errors, which are those of read_json."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError:
        raise UserError(path, "is not UTF-8", "write it again") from None
    except ValueError as error:
        raise UserError(path, f"is not JSON ({error})", "write it again, or download it again") from None
    except RecursionError:
        raise UserError(path, "is nested too deep", "write it again, or download it again") from None
    if not isinstance(content, dict):
        raise UserError(path, "is not a JSON object", "write it again, or download it again")
    if _deeper_than(content, DEPTH):
        raise UserError(path, "is nested too deep", "write it again, or download it again")
    return content


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _deeper_than(value: object, depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            each
            for found in level
            for each in (found.values() if isinstance(found, dict) else found)
            if isinstance(each, dict | list)
        ]
        if not level:
            return False
    return True


def _unreadable(path: Path, error: OSError | ValueError, remedy: str) -> UserError:
    number = getattr(error, "errno", None)
    reason = (number and REASONS.get(number)) or f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return UserError(path, reason, remedy)

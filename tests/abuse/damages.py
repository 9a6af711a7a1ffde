"""Ways to damage a file, whatever it holds: each a function of the file's path."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def written(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def at(name: str, damage: Damage) -> Damage:
    """The damage, done to a file of the folder."""
    return lambda folder: damage(folder / name)


def keys(**values: object) -> Damage:
    """These keys of a JSON object; None leaves one out."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def header(change: Callable[[dict], None]) -> Damage:
    """A safetensors file whose header is changed."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + size])
        change(found)
        encoded = json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])

    return damage


def instead(make: Damage) -> Damage:
    """Something else in the file's place."""

    def damage(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return damage


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


IN_ITS_PLACE = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "socket": _socket,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "null device": lambda path: path.symlink_to("/dev/null"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "links in a circle": lambda path: path.symlink_to(path.name),
    "a terabyte": _sparse,
}

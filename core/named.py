"""Files that an option names, outside any --out: a check's --json, --junit and --save, generate's --out, --picture and --mask.

They may be written again and again, so what stands there is replaced where it is such a file itself, and nothing else is: a
mistyped name costs nobody a file.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import numpy as np

from suture.core.errors import UserError
from suture.core.manifest import MANIFEST, own_names, read_manifest

LONGEST = 1 << 20  # bytes that are read to recognise a file
JSON = re.compile(rb'\{\n  "(model|title|before)": ".*",\n  "(tensorrt|verdict|after)": "')
JUNIT = re.compile(rb"<\?xml version='1.0' encoding='utf-8'\?>\n<testsuite name=\"suture ")
NETWORK = re.compile(rb'\{\n "format": 1,\n "tensorrt": "')
TEXTS = re.compile(rb'\{.*"text": ".*", "finish": "\w+", "prompt_tokens": \d+, "tokens": \d+\}\n')
PICTURE = re.compile(rb"\x89PNG\r\n\x1a\n.{0,64}tEXtSoftware\x00suture", re.DOTALL)
BEGINNINGS = {  # of what each of the options writes
    "--json": JSON, "--junit": JUNIT, "--save": NETWORK, "--out": TEXTS, "--picture": PICTURE, "--mask": PICTURE,
}  # fmt: skip


def check_results(results: Mapping[str, Path | None], read: Iterable[Path | None], out: Path | None = None) -> None:
    """Raises UserError where a file that an option names cannot be written, would replace one that is not such a result, or
    would stand in the folder `out`, which a stage writes. `results`: by option; `read`: the files that are read."""
    inputs = {name for each in read if each for name in (os.path.realpath(each), os.path.abspath(each))}
    places: dict[str, str] = {}
    for option, path in results.items():
        if path is not None:
            _check(path, inputs, out, option)
            if (other := places.setdefault(os.path.realpath(path), option)) != option:
                raise UserError(path, f"is named by {other} and {option}", f"name another file with {option}")


def _check(path: Path, inputs: set[str], out: Path | None, option: str) -> None:
    remedy = f"name another file with {option}"
    if path.is_symlink():
        raise UserError(path, "is a link and would be replaced", remedy)
    if out is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise UserError(path, "lies in --out, which holds a stage's results alone", remedy)
    if not path.parent.is_dir():
        raise UserError(path.parent, "is not a folder", f"make it, or name another place with {option}")
    if path.exists() and not path.is_file():
        raise UserError(path, "is not a regular file", remedy)
    if {os.path.realpath(path), os.path.abspath(path)} & inputs:
        raise UserError(path, "is read here and would be replaced", remedy)
    for place in {path.absolute(), path.resolve()}:
        for folder in place.parents:
            manifest = read_manifest(folder)
            if manifest is not None and place.relative_to(folder).as_posix() in {*own_names(manifest), MANIFEST}:
                raise UserError(path, "is a stage's result and would be replaced", remedy)
    if path.exists() and not BEGINNINGS[option].match(_beginning(path)):
        raise UserError(path, f"is no result of {option} and would be replaced", remedy)


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(3 * LONGEST)


@contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there, in place of what was, when all is written."""
    umask = os.umask(0)
    os.umask(umask)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.chmod(file.name, 0o666 & ~umask)
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with appearing(path) as file:
        file.write(text.encode())


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """uint8 [H,W] or [H,W,3] as a PNG file that says what wrote it, by which it may be written again."""
    from PIL import Image  # here, and below: the stages that write no picture need not know them
    from PIL.PngImagePlugin import PngInfo

    made_by = PngInfo()
    made_by.add_text("Software", "suture")
    with appearing(path) as file:
        Image.fromarray(pixels).save(file, "PNG", pnginfo=made_by)

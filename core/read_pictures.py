"""Reads pictures that others made: PNG and JPEG files of a size that memory holds, and no other of the formats that Pillow knows,
some of which it hands to other programs."""

import warnings
from pathlib import Path

from PIL import Image

from suture.core.errors import UserError
from suture.core.reader import open_regular
from suture.core.refusals import BrokenFile, refusals

FORMATS = ("PNG", "JPEG")
MOST_PIXELS = 1 << 26  # 200 MB as RGB, however small the file is


def read_picture(path: Path) -> Image.Image:
    """RGB. Raises UserError for a file that is no such picture, or a very large one."""
    remedy = "name a PNG or JPEG file"
    with (
        open_regular(path, remedy) as file,
        refusals(path, "is not a picture that can be read", remedy),
        warnings.catch_warnings(action="ignore"),  # of its size, and its palette
        Image.open(file, formats=FORMATS) as picture,
    ):
        if picture.width * picture.height > MOST_PIXELS:
            wrong = f"has {picture.width}x{picture.height} pixels, and {MOST_PIXELS:,} can be read"
            raise UserError(path, wrong, "make it smaller")
        if picture.mode == "P" and picture.palette is None:
            raise BrokenFile("is a PNG picture of a palette that it does not have")
        return picture.convert("RGB")

"""Frames of a video on the command line, of a model that makes them (CoDeF), to PNG files."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.frames import CANONICAL, DEFORMATION, makes_frames
from suture.core.manifest import recorded_option
from suture.core.named import check_results, write_picture
from suture.core.parts import find_parts
from suture.core.read_pictures import read_picture
from suture.generate.parts import open_part
from suture.runtime.frames import FrameModel, as_pixels, read_sizes


def draw_frames(options: argparse.Namespace) -> Iterator[str]:
    """Writes the frames that are asked for, and says of each where it is. Raises UserError where something cannot be read or run."""
    parts = {part.name: part for part in find_parts(options.out)}
    if not makes_frames(parts.values()):
        raise UserError(options.out, f"makes no frames of a video: its parts are {', '.join(parts)}", "give --prompt TEXT")
    recorded = options.checkpoint or recorded_option(parts[CANONICAL].folder / "export", "checkpoint")
    sizes = read_sizes(Path(recorded or options.out))
    numbers = _numbers(options.frame, sizes.frames)
    places = {number: _place(options.picture, number, len(numbers)) for number in numbers}
    for place in places.values():
        check_results({"--picture": place}, [options.edited])
    edited = None if options.edited is None else np.asarray(read_picture(options.edited))
    model = FrameModel(*(open_part(parts[name], options.runtime)[0] for name in (DEFORMATION, CANONICAL)), sizes.points)
    height, width = options.size or (sizes.height, sizes.width)
    for number, place in places.items():
        write_picture(place, as_pixels(_drawn(model, number, edited, height, width)))
        yield str(place)


def _drawn(model: FrameModel, number: int | None, edited: np.ndarray | None, height: int, width: int) -> np.ndarray:
    if number is None:
        return model.canonical(height, width)
    return model.frame(number, height, width) if edited is None else model.carried(edited, number, height, width)


def _numbers(asked: tuple[int, int] | str, frames: int) -> list[int | None]:
    """None: the canonical picture."""
    if asked == "canonical":
        return [None]
    first, last = (0, frames - 1) if asked == "all" else asked
    if last >= frames:
        raise UserError(f"--frame {last}", f"the video has {frames} frames, from 0", f"name one up to {frames - 1}")
    return list(range(first, last + 1))


def _place(picture: Path, number: int | None, count: int) -> Path:
    """FILE.png, or of several frames FILE-0007.png."""
    return picture if count == 1 else picture.with_stem(f"{picture.stem}-{number:04}")

"""Frames of a video from CoDeF's two parts, whatever runs them: places in a frame to places in the canonical picture, to colours."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.frames import AT_ONCE, COLOURS, FRAMES, GRID, POINTS
from suture.core.reader import read_json

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # inputs by name to outputs by name


@dataclass(frozen=True)
class Sizes:
    height: int  # of the video's pictures, in pixels
    width: int
    frames: int
    points: int = AT_ONCE  # of a row that the graphs take


def read_sizes(checkpoint: Path) -> Sizes:
    """Raises UserError where config.json does not say them."""
    file = checkpoint / "config.json"
    config = read_json(file, "name the checkpoint's folder with --checkpoint DIR")
    sizes = [config.get(name) for name in ("height", "width", "frames")] + [config.get("points", AT_ONCE)]
    if not all(type(size) is int and 0 < size <= 1 << 20 for size in sizes):
        raise UserError(file, "does not say the video's height, width and frames", "write them there")
    return Sizes(*sizes)


class FrameModel:
    def __init__(self, deform: Run, colour: Run, points: int = AT_ONCE):
        self.deform, self.colour, self.points = deform, colour, points

    def frame(self, number: int, height: int, width: int) -> np.ndarray:
        """Frame `number`, from 0, as float32 [height, width, 3], 0 to 1."""
        return self._picture((self._colours(points) for points in self._moved(number, height, width)), height, width)

    def canonical(self, height: int, width: int) -> np.ndarray:
        """The canonical picture, what lies in it where a frame's pixels lie in the frame: the same type."""
        return self._picture((self._colours(points) for points in self._grid(height, width)), height, width)

    def carried(self, edited: np.ndarray, number: int, height: int, width: int) -> np.ndarray:
        """Frame `number` of another canonical picture, uint8 [any, any, 3]; beyond its edges their colour."""
        return self._picture((sampled(edited, points[0]) for points in self._moved(number, height, width)), height, width)

    def _grid(self, height: int, width: int) -> Iterator[np.ndarray]:
        """The centres of a picture's pixels, (y, x) from 0 to 1, a row at a time: float32 [1, points, 2], the last filled up."""
        y, x = ((np.arange(side, dtype=np.float32) + 0.5) / side for side in (height, width))
        places = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
        places = np.pad(places, ((0, -len(places) % self.points), (0, 0)), mode="edge")
        yield from places.reshape(-1, 1, self.points, 2)

    def _moved(self, number: int, height: int, width: int) -> Iterator[np.ndarray]:
        for places in self._grid(height, width):
            yield self.deform({GRID: places, FRAMES: np.array([number], np.int64)})[POINTS].astype(np.float32)

    def _colours(self, points: np.ndarray) -> np.ndarray:
        return self.colour({POINTS: points})[COLOURS][0].astype(np.float32)

    @staticmethod
    def _picture(rows: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
        colours = np.concatenate(list(rows))[: height * width]
        return np.nan_to_num(colours).clip(0, 1).reshape(height, width, 3)


def sampled(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Between its pixels: uint8 [H, W, 3] at points (y, x) from 0 to 1, to float32 [points, 3], 0 to 1."""
    sides = np.array(picture.shape[:2])
    places = np.clip(points * sides - 0.5, 0, sides - 1)
    low = np.minimum(places.astype(int), np.maximum(sides - 2, 0))
    high, part = np.minimum(low + 1, sides - 1), (places - low).astype(np.float32)
    rows = [picture[y, low[:, 1]] * (1 - part[:, 1:]) + picture[y, high[:, 1]] * part[:, 1:] for y in (low[:, 0], high[:, 0])]
    return (rows[0] * (1 - part[:, :1]) + rows[1] * part[:, :1]).astype(np.float32) / 255


def as_pixels(picture: np.ndarray) -> np.ndarray:
    """float32 0 to 1 to uint8."""
    return np.rint(picture * 255).astype(np.uint8)

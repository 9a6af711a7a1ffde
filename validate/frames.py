"""Level 5 of a model that makes frames of a video: PyTorch in float32, its weights rounded to the graphs' type, and the portable graphs.

Some frames from the first to the last, the canonical picture, and the frames of an edited canonical picture, whose edit is drawn.
"""

import base64
import io

import numpy as np
from PIL import Image

from suture.core.errors import UserError
from suture.core.frames import CANONICAL, DEFORMATION
from suture.models.drawn_pictures import random_scene
from suture.runtime.frames import FrameModel, Sizes, as_pixels, read_sizes
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.graph_part import in_onnxruntime, in_pytorch, make_inputs
from suture.validate.level import FrameResult, Level, failed, not_run
from suture.validate.pipeline import NOT_HERE, Pipeline

TITLE = "Frames of the video"
MANY, FEW, LARGE = 5, 2, 1 << 17  # frames, by the pixels of one
SHOWN, SMALL = 3, 256  # frames that are shown, and the longer of their sides
# The least decibels, whatever type the graphs compute in: tiny-codef in float16 has 76.0, with a hash or a floor that is wrong 27.3 and
# 19.2 in its worst frame. A bfloat16 graph runs in onnxruntime as its float32 shadow copy.
LIMIT = 60.0
MOST = 120.0  # decibels of pictures that hardly differ, or do not


def frames_level(pipeline: Pipeline, seed: int) -> Level:
    parts = {files.part.name: files for files in pipeline.parts}
    names = (DEFORMATION, CANONICAL)
    if any(parts[name].portable is None for name in names):
        return not_run(5, "surgery has not been run on all parts", TITLE)
    if pipeline.checkpoint is None:
        return not_run(5, NOT_HERE, TITLE)
    try:
        dtype, _ = make_inputs(parts[CANONICAL].exported, parts[CANONICAL].part, seed)
        sizes = read_sizes(pipeline.checkpoint)
        reference = FrameModel(*(in_pytorch(pipeline.checkpoint, parts[name], dtype).run for name in names), sizes.points)
        candidate = FrameModel(*(in_onnxruntime(parts[name].portable, "portable").run for name in names), sizes.points)
        found = compare_frames(reference, candidate, sizes, LIMIT, seed)
    except UserError as error:
        return failed(5, error, TITLE)
    return Level(5, TITLE, PASSED if found.passed else DIFFERENT, frames=found)


def compare_frames(reference: FrameModel, candidate: FrameModel, sizes: Sizes, limit: float, seed: int) -> FrameResult:
    height, width = sizes.height, sizes.width
    count = min(MANY if height * width <= LARGE else FEW, sizes.frames)
    numbers = np.linspace(0, sizes.frames - 1, count).round().astype(int).tolist()
    drawn, psnr, edited, rows = _edit(height, width, seed), [], [], []
    for number in numbers:
        ours, theirs = (model.frame(number, height, width) for model in (reference, candidate))
        carried = [model.carried(drawn, number, height, width) for model in (reference, candidate)]
        psnr.append(decibels(ours, theirs))
        edited.append(decibels(*carried))
        rows.append(np.concatenate([ours, theirs, *carried], 1))
    canonical = [model.canonical(height, width) for model in (reference, candidate)]
    return FrameResult(
        "PyTorch", "portable", numbers, limit, psnr, decibels(*canonical), edited, _png(np.concatenate(rows[:SHOWN]), width)
    )


def decibels(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Of float pictures from 0 to 1; at most MOST."""
    error = float(np.mean((reference.astype(np.float64) - candidate) ** 2))
    return round(min(MOST, -10 * np.log10(max(error, 10 ** (-MOST / 10)))), 2)


def _edit(height: int, width: int, seed: int) -> np.ndarray:
    """Another canonical picture: shapes, and stripes that show where each of its points goes. uint8 [height, width, 3]"""
    picture = random_scene(np.random.default_rng(seed), height, width, 3).picture(height, width).astype(np.int64)
    y, x = np.indices([height, width])
    stripes = ((8 * (x + y) // (height + width)) % 2)[..., None]
    return (picture + 40 * stripes).clip(0, 255).astype(np.uint8)


def _png(pixels: np.ndarray, width: int) -> str:
    step = -(-width // SMALL)
    written = io.BytesIO()
    Image.fromarray(as_pixels(pixels)[::step, ::step]).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"

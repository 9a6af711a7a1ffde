"""A picture and points in it, on the command line, to the picture of a mask."""

import argparse
from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.manifest import recorded_option
from suture.core.masks import BESIDE, DECODER, ENCODER, INSIDE, PIXELS, makes_masks
from suture.core.named import check_results, write_picture
from suture.core.parts import PartFolder, find_parts
from suture.core.read_pictures import read_picture
from suture.generate.parts import open_part
from suture.runtime.segment import MaskPrompt, Run, Segmenter, open_processor


def segment(options: argparse.Namespace) -> str:
    """Writes the mask, white on black, and says in one line what it is. Raises UserError where something cannot be read or run."""
    parts = {part.name: part for part in find_parts(options.out)}
    if not makes_masks(parts.values()):
        raise UserError(options.out, f"makes no masks: its parts are {', '.join(parts)}", "give --prompt TEXT")
    check_results({"--mask": options.mask}, [options.picture])
    picture = read_picture(options.picture)
    prompt = _prompt(options, *picture.size)
    (encode, side), (decode, _) = (_opened(parts[name], options.runtime) for name in (ENCODER, DECODER))
    recorded = options.checkpoint or recorded_option(parts[ENCODER].folder / "export", "checkpoint")
    found = Segmenter(open_processor(Path(recorded or options.out), side), encode, decode)(picture, prompt)
    write_picture(options.mask, found.best.astype(np.uint8) * 255)
    score, share = float(found.scores.max()), float(found.best.mean())
    return f"{options.mask}: {share:.1%} of the picture, expected intersection over union {score:.2f}"


def _prompt(options: argparse.Namespace, width: int, height: int) -> MaskPrompt:
    """Raises UserError for a point or a box that does not lie in the picture."""
    given = [(point, INSIDE) for point in options.point] + [(point, BESIDE) for point in options.beside]
    for option, (x, y) in [
        *(("--point", point) for point in options.point),
        *(("--beside", point) for point in options.beside),
    ]:
        if not (x < width and y < height):
            raise UserError(f"{option} {x:g},{y:g}", f"the picture has {width}×{height} pixels", "name a point in it")
    box = options.box
    if box is not None and not (box[0] < box[2] <= width and box[1] < box[3] <= height):
        shown = ",".join(f"{each:g}" for each in box)
        raise UserError(
            f"--box {shown}", f"is no LEFT,TOP,RIGHT,BOTTOM in {width}×{height} pixels", "name a box in the picture"
        )
    return MaskPrompt(tuple(point for point, _ in given), tuple(label for _, label in given), box)


def _opened(part: PartFolder, runtime: str) -> tuple[Run, int]:
    """What runs the part, and the side of its pictures in pixels."""
    run, graph = open_part(part, runtime)
    sizes = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in graph.graph.input}
    return run, sizes.get(PIXELS, 0)

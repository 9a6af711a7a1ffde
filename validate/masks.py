"""What a difference means for masks: both models are asked for the shapes of the same drawn pictures, coloured
and outlined, each by a point in it.

Whether a model knows such pictures is its own affair: the masks of two are compared with each other, and with what was drawn.
"""

import base64
import io

import numpy as np
from onnx import TensorProto
from PIL import Image

from suture.core.errors import UserError
from suture.core.masks import DECODER, ENCODER, INSIDE, PIXELS
from suture.core.weights import load_graph
from suture.models.drawn_pictures import random_scene
from suture.runtime.segment import MaskPrompt, Segmenter, open_processor, overlap
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.graph_part import in_onnxruntime, in_pytorch, make_inputs
from suture.validate.level import Level, MaskResult, failed, not_run
from suture.validate.pipeline import NOT_HERE, PartFiles, Pipeline

TITLE = "Masks of drawn pictures"
LARGE, MANY, FEW = 512, 20, 2  # pictures, by the pixels of a side
SHOWN = 3
# The least mean intersection over union of two models' masks: what rounding moves of outlines, in each type.
LIMITS = {TensorProto.FLOAT: 0.999, TensorProto.FLOAT16: 0.99, TensorProto.BFLOAT16: 0.97}
TINT = np.array([255, 60, 60])


def masks_level(pipeline: Pipeline, seed: int) -> Level:
    """Level 5 of a model that makes masks: PyTorch in float32, its weights rounded to the graph's type, and the portable graphs."""
    parts = {files.part.name: files for files in pipeline.parts}
    if any(parts[name].portable is None for name in (ENCODER, DECODER)):
        return not_run(5, "surgery has not been run on all parts", TITLE)
    if pipeline.checkpoint is None:
        return not_run(5, NOT_HERE, TITLE)
    try:
        dtype, _ = make_inputs(parts[ENCODER].exported, parts[ENCODER].part, seed)
        side = _side(parts[ENCODER])
        processor = open_processor(pipeline.checkpoint, side)
        of_torch = [in_pytorch(pipeline.checkpoint, parts[name], dtype).run for name in (ENCODER, DECODER)]
        of_graphs = [in_onnxruntime(parts[name].portable, "portable").run for name in (ENCODER, DECODER)]
        found = compare_masks(Segmenter(processor, *of_torch), Segmenter(processor, *of_graphs), side, LIMITS[dtype], seed)
    except UserError as error:
        return failed(5, error, TITLE)
    return Level(5, TITLE, PASSED if found.passed else DIFFERENT, masks=found)


def compare_masks(reference: Segmenter, candidate: Segmenter, side: int, limit: float, seed: int) -> MaskResult:
    random = np.random.default_rng(seed)
    alike, of_reference, of_candidate, rows = [], [], [], []
    for at in range(MANY if side <= LARGE else FEW):
        scene = random_scene(random, side, side, int(random.integers(1, 4)))
        picture, drawn = (scene.edges if at % 2 else scene.picture)(side, side), scene.masks(side, side)[0]
        prompt = MaskPrompt(((scene.shapes[0].x, scene.shapes[0].y),), (INSIDE,))
        ours, theirs = (_best(each, picture, prompt) for each in (reference, candidate))
        alike.append(overlap(ours, theirs))
        of_reference.append(overlap(ours, drawn))
        of_candidate.append(overlap(theirs, drawn))
        rows.append(np.concatenate([picture, _tinted(picture, ours), _tinted(picture, theirs)], 1))
    means = (float(np.mean(each)) for each in (alike, of_reference, of_candidate))
    mean_alike, mean_reference, mean_candidate = means
    return MaskResult(
        "PyTorch", "portable", len(alike), limit, mean_alike, min(alike), mean_reference, mean_candidate, _png(rows[:SHOWN])
    )


def _best(segmenter: Segmenter, picture: np.ndarray, prompt: MaskPrompt) -> np.ndarray:
    return segmenter(Image.fromarray(picture), prompt).best


def _side(files: PartFiles) -> int:
    """Of the encoder's square picture, in pixels."""
    (pixels,) = [value for value in load_graph(files.exported).graph.input if value.name == PIXELS]
    return pixels.type.tensor_type.shape.dim[-1].dim_value


def _tinted(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], (picture + 2 * TINT) // 3, picture // 2 + 100).astype(np.uint8)


def _png(rows: list[np.ndarray]) -> str:
    written = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"

"""A picture and points in it to masks: transformers' own processor of SAM around whatever runs the model's two parts."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.processing_sam import SamProcessor

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.masks import FEATURES, FIRST_CORNER, LABELS, LAST_CORNER, MASKS, NONE, PIXELS, POINTS, SCORES
from suture.core.refusals import refusals
from suture.core.typed import Strict, read_typed

PREPROCESSOR = "preprocessor_config.json"
REMEDY = "put the checkpoint's own there"

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # inputs by name, floats as float32, to outputs by name


Side = Annotated[int, Field(ge=1, le=1 << 14)]
Channels = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=3, max_length=3)]


class Preprocessor(Strict):
    """What transformers makes of a picture, as far as sizes and numbers go."""

    size: dict[str, Side] | None = None
    pad_size: dict[str, Side] | None = None
    image_mean: Channels | None = None
    image_std: Deviations | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None
    do_resize: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    do_pad: bool | None = None
    do_convert_rgb: bool | None = None


@dataclass(frozen=True)
class MaskPrompt:
    """What is to be masked, in the picture's pixels."""

    points: tuple[tuple[float, float], ...] = ()  # x, y
    labels: tuple[int, ...] = ()  # of each point: 1, it is in the mask; 0, it is beside it
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom


@dataclass(frozen=True)
class Found:
    masks: np.ndarray  # bool [masks, height, width]
    scores: np.ndarray  # float32 [masks]: the intersection over union that the model expects of each

    @property
    def best(self) -> np.ndarray:
        return self.masks[self.scores.argmax()]


def open_processor(checkpoint: Path, side: int) -> SamProcessor:
    """The checkpoint's own, or, where it has no preprocessor_config.json, SAM's for pictures of `side` pixels. Raises UserError where
    that file is none, or makes pictures of another size."""
    file = checkpoint / PREPROCESSOR
    pad = {"height": side, "width": side}
    if not os.path.lexists(file):
        return SamProcessor(SamImageProcessorPil(size={"longest_edge": side}, pad_size=pad))
    read_typed(inside(checkpoint, PREPROCESSOR), Preprocessor, REMEDY)
    with refusals(file, "is refused by transformers", REMEDY):
        processor = SamImageProcessorPil.from_pretrained(str(checkpoint), local_files_only=True)
        made = dict(processor.pad_size), processor.size["longest_edge"]
    if (made[0].get("height"), made[0].get("width"), made[1]) != (side, side, side):
        raise UserError(
            file,
            f"makes pictures of {json.dumps(made[0])} pixels, and the graph takes {side}",
            REMEDY,
        )
    return SamProcessor(processor)


class Segmenter:
    def __init__(self, processor: SamProcessor, encode: Run, decode: Run):
        self.processor, self.encode, self.decode = processor, encode, decode

    def __call__(self, picture: Image.Image, prompt: MaskPrompt) -> Found:
        """The masks of one picture and one prompt, at the picture's size."""
        given = self._prepared(picture, prompt)
        features = _given(self.encode({PIXELS: given["pixel_values"].astype(np.float32)}), FEATURES, 4)
        found = self.decode({FEATURES: features, **_as_points(given, prompt)})
        if _given(found, MASKS, 4).shape[:2] != _given(found, SCORES, 2).shape or not found[SCORES].size:
            raise UserError("the graph", f"gives {MASKS} and {SCORES} that do not go together", "export the checkpoint again")
        logits = [torch.from_numpy(found[MASKS].astype(np.float32))]
        (masks,) = self.processor.post_process_masks(logits, given["original_sizes"], given["reshaped_input_sizes"])
        return Found(masks[0].numpy(), found[SCORES][0].astype(np.float32))

    def _prepared(self, picture: Image.Image, prompt: MaskPrompt) -> Arrays:
        asked = {}
        if prompt.points:
            asked["input_points"] = [[[list(map(float, point)) for point in prompt.points]]]
            asked["input_labels"] = [[list(prompt.labels)]]
        if prompt.box is not None:
            asked["input_boxes"] = [[list(map(float, prompt.box))]]
        with refusals("the picture", "cannot be brought to the size that the encoder takes", "cut it, or make it larger"):
            return dict(self.processor(images=picture, return_tensors="np", **asked))


def _given(found: Arrays, name: str, rank: int) -> np.ndarray:
    if name not in found or found[name].ndim != rank:
        raise UserError("the graph", f"gives no {name} of {rank} dimensions", "export the checkpoint again")
    return found[name]


def _as_points(given: Arrays, prompt: MaskPrompt) -> Arrays:
    """What the decoder takes: the points, then a box's corners, or a point that is none."""
    points = [given["input_points"].reshape(-1, 2)] if prompt.points else []
    corners = given["input_boxes"].reshape(2, 2) if prompt.box is not None else np.zeros((1, 2))
    labels = [*prompt.labels, *([FIRST_CORNER, LAST_CORNER] if prompt.box is not None else [NONE])]
    placed = np.concatenate([*points, corners])[None].astype(np.float32)
    return {POINTS: placed, LABELS: np.array([labels], np.int64)}


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = int((found | wanted).sum())
    return int((found & wanted).sum()) / union if union else 1.0

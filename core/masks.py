"""What a model from points in a picture to masks calls its parts, their inputs and outputs, as transformers' SamModel does."""

from collections.abc import Iterable

from suture.core.parts import PartFolder

ENCODER, DECODER = "image_encoder", "mask_decoder"
PIXELS, FEATURES, POINTS, LABELS = "pixel_values", "image_embeddings", "input_points", "input_labels"
MASKS, SCORES = "pred_masks", "iou_scores"
# A point's label: of the mask, beside it, the corners of a box around it, and of none, which ends the points where there is no box.
INSIDE, BESIDE, FIRST_CORNER, LAST_CORNER, NONE = 1, 0, 2, 3, -1


def makes_masks(parts: Iterable[PartFolder]) -> bool:
    return {ENCODER, DECODER} <= {part.name for part in parts}

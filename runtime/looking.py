"""A picture to the embeddings that stand for it: transformers' own image processor, then the model's vision part."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor

from suture.core.errors import UserError
from suture.core.pictures import FEATURES, PIXELS
from suture.core.reader import read_json
from suture.core.refusals import refusals

PREPROCESSOR = "preprocessor_config.json"

Arrays = dict[str, np.ndarray]


class Looker:
    """`encode`: the vision part, inputs by name to outputs by name; `size`: height and width of what it takes."""

    def __init__(self, checkpoint: Path, encode: Callable[[Arrays], Arrays], size: tuple[int, int]):
        self.file, self.encode, self.size = checkpoint / PREPROCESSOR, encode, size
        read_json(self.file, "put the checkpoint's own there")
        with self._refusals():
            self.processor = AutoImageProcessor.from_pretrained(
                str(checkpoint), local_files_only=True, trust_remote_code=False, backend="pil"
            )

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """float32 [1, 3, height, width] of an RGB picture. Raises UserError where the processor makes another size."""
        height, width = self.size
        with self._refusals():
            if not hasattr(self.processor, "merge_size"):
                pixels = np.asarray(self.processor(images=picture, return_tensors="np")[PIXELS], np.float32)
            else:  # it takes any size, and the graph one
                resized = picture.resize((width, height), Image.Resampling(int(self.processor.resample)))
                packed = self.processor(images=resized, do_resize=False, return_tensors="np")[PIXELS]
                pixels = self._unpacked(np.asarray(packed, np.float32))
        if pixels.shape != (1, 3, height, width):
            made = "×".join(map(str, pixels.shape))
            raise UserError(
                self.file,
                f"makes pictures of {made}, and the graph takes 1×3×{height}×{width}",
                "put the checkpoint's own there",
            )
        return pixels

    def features(self, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """float32 [tokens, hidden], and on how many rows and columns they stand."""
        found = self.encode({PIXELS: self.pixels(picture)})[FEATURES][0].astype(np.float32)
        factor = getattr(self.processor, "merge_size", 0) * getattr(self.processor, "patch_size", 0)
        return found, (self.size[0] // factor, self.size[1] // factor) if factor else (1, len(found))

    def _unpacked(self, patches: np.ndarray) -> np.ndarray:
        """[N, 3·2·p·p], as Qwen2-VL's processor packs them, to [1, 3, height, width]."""
        unit, size = self.processor.merge_size, self.processor.patch_size
        rows, columns = self.size[0] // size // unit, self.size[1] // size // unit
        x = patches.reshape(rows, columns, unit, unit, 3, -1, size, size)[:, :, :, :, :, 0]
        return x.transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, *self.size)

    def _refusals(self):
        return refusals(self.file, "is refused by transformers", "put the checkpoint's own there")


def size_of(shape: list) -> tuple[int, int]:
    """Height and width of a vision part's pictures, as its description has their shape."""
    height, width = shape[-2:]
    return int(height), int(width)

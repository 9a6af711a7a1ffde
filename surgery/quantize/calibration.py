"""The text that formats are fitted to, as windows of tokens."""

from pathlib import Path

import numpy as np

from suture.core.errors import UserError
from suture.core.manifest import recorded_folder
from suture.core.reader import TEXT_LIMIT, read_bytes
from suture.models.tokenizer import open_tokenizer, tokenizer_files
from suture.surgery.quantize.options import Request

DEFAULT = Path(__file__).with_name("calibration.txt")  # prose and code, from CPython's documentation and library
WINDOWS = 64
WINDOW = 256  # tokens


def files_read(request: Request, model: Path) -> list[Path]:
    """What read_windows reads, apart from the text that comes along."""
    folder = request.tokenizer or _checkpoint(model)
    return [*([request.calibration] if request.calibration else []), *(tokenizer_files(folder) if folder else [])]


def read_windows(request: Request, model: Path, capacity: int | None) -> np.ndarray:
    """int64 [windows, tokens] of the text, spread evenly over it. The tokenizer is that of the checkpoint from which the
    graph in file `model` was exported, unless its folder is named. Raises UserError where there is none, or no text."""
    folder = request.tokenizer or _checkpoint(model)
    if folder is None:
        raise UserError(
            "--quantize", f"needs a tokenizer, and {model} does not say its checkpoint", "name it with --tokenizer DIR"
        )
    path = request.calibration or DEFAULT
    content = read_bytes(path, TEXT_LIMIT, "name a text file with --calibration").decode("utf-8", "replace")
    ids = open_tokenizer(folder).encode(content)
    window = min(WINDOW, capacity or WINDOW)
    if len(ids) < 2 * window:
        raise UserError(path, f"is too short to calibrate with: {len(ids)} tokens", f"give at least {2 * window}")
    starts = np.unique(np.linspace(0, len(ids) - window, min(WINDOWS, len(ids) // window)).astype(int))
    return np.array([ids[start : start + window] for start in starts], np.int64)


def _checkpoint(model: Path) -> Path | None:
    return recorded_folder(model.parent, "checkpoint")

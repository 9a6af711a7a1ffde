"""Files of a folder that others made, which may be links."""

from pathlib import Path

from suture.core.errors import UserError
from suture.core.tensors import hub_folder


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, which may be a link to another in it or, in a snapshot of the Hugging Face cache, to a blob of the
    same model. Raises UserError where it leads elsewhere."""
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError(path, f"cannot be read ({error})", "put the file itself there") from None
    cache = hub_folder(root)
    if not real.is_relative_to(root) and not (cache and real.is_relative_to(cache / "blobs")):
        raise UserError(path, f"leads out of its folder, to {real}", "put the file itself there")
    return path

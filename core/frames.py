"""What a model of a video's frames, CoDeF, calls its parts, their inputs and outputs."""

from collections.abc import Iterable

from suture.core.parts import PartFolder

DEFORMATION, CANONICAL = "deformation", "canonical"
GRID, FRAMES, POINTS, COLOURS = "grid", "frames", "points", "rgb"
AT_ONCE = 4096  # points of a row of these, where config.json does not say another number as "points"


def makes_frames(parts: Iterable[PartFolder]) -> bool:
    return {DEFORMATION, CANONICAL} <= {part.name for part in parts}

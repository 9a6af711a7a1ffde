"""One grammar for the shapes of inputs, on every command line:

NAME=2x128                  one shape
NAME=1x1,1x128,4x512        least, most usual and largest (TensorRT's min, opt, max)
@FILE                       those in a text file, one a line
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from suture.core.errors import UserError
from suture.core.reader import read_bytes

OPTION = "--shape"
EXAMPLE = "write NAME=2x128, or NAME=1x1,1x128,4x512 (min, opt, max)"
FILE_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input; all three are one where one was given."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @property
    def different(self) -> dict[str, tuple[int, ...]]:
        """By what they are, without those that stand there already."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in (("opt", self.optimum), ("min", self.minimum), ("max", self.maximum)):
            if shape not in found.values():
                found[name] = shape
        return found


def parse_shapes(texts: Iterable[str]) -> dict[str, ShapeRange]:
    """By input. Raises UserError where a text is not of the grammar, or an input comes twice."""
    shapes: dict[str, ShapeRange] = {}
    for text in _lines(texts):
        name, found = parse_shape(text)
        if name in shapes:
            raise UserError(f"{OPTION} {text}", f"{name} has a shape already", "give each input once")
        shapes[name] = found
    return shapes


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text.startswith("@"):
            content = read_bytes(Path(text[1:]), FILE_LIMIT).decode("utf-8", "replace")
            yield from (line.strip() for line in content.splitlines() if line.strip())
        else:
            yield text


def parse_shape(text: str) -> tuple[str, ShapeRange]:
    where = f"{OPTION} {text}"
    name, equals, rest = text.rpartition("=")
    if not equals or not name:
        raise UserError(where, "names no input", EXAMPLE)
    parts = rest.split(",")
    if len(parts) not in (1, 3):
        raise UserError(where, f"has {len(parts)} shapes", EXAMPLE)
    shapes = []
    for part in parts:
        sizes = part.lower().split("x")
        if not all(size.isascii() and size.isdigit() for size in sizes):
            raise UserError(where, f"{part or 'nothing'} is not a shape", EXAMPLE)
        shapes.append(tuple(map(int, sizes)))
    low, usual, high = shapes * 3 if len(shapes) == 1 else shapes
    if len({len(shape) for shape in shapes}) > 1:
        raise UserError(where, "its shapes have different numbers of dimensions", EXAMPLE)
    if any(not a <= b <= c for a, b, c in zip(low, usual, high)):
        raise UserError(where, "min is not below opt and max in every dimension", EXAMPLE)
    return name, ShapeRange(low, usual, high)


def check_shapes(model: object, inputs: Iterable[onnx.ValueInfoProto], shapes: dict[str, ShapeRange]) -> None:
    """Raises UserError where a shape is of no input, or none that the input takes. `model` is what the line names."""
    known = {value.name: value for value in inputs}
    for name, given in shapes.items():
        if name not in known:
            raise UserError(model, f"has no input {name}", f"its inputs are {', '.join(known) or 'none'}")
        dims = known[name].type.tensor_type.shape.dim
        wanted = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or "?" for dim in dims]
        for shape in {given.minimum, given.optimum, given.maximum}:
            fits = len(shape) == len(wanted) and all(not isinstance(w, int) or w == s for w, s in zip(wanted, shape))
            if not fits and known[name].type.tensor_type.HasField("shape"):
                said = "x".join(map(str, shape))
                raise UserError(model, f"input {name} is {wanted}, not {said}", f"give {OPTION} {name}=... that fits")

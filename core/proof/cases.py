"""What graphs are compared on: steps where they have caches, else inputs drawn so that the source takes them."""

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import onnx

from suture.core.network.inputs import Feeds, make_feeds, open_lengths, switched
from suture.core.proof.steps import STEPS, Step, Steps
from suture.core.signature import Signature

SIZES = ((2, 8), (1, 1), (1, 5), (8, 8))  # rows, and other open dimensions; the last where a graph takes no others
APART = ((4, 3), (8, -3))  # the first named dimension that is no batch, and by how much each further one differs
ENOUGH = 3  # inputs of a graph without caches, beside those of APART
SEED = 7919  # not one that somebody may have drawn weights with
SMALL = 0.01  # noise of that size has a mean square of 1e-4, beside which the epsilon of a norm shows
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def make_cases(
    source: onnx.ModelProto, of_source: Signature, portable: onnx.ModelProto, of_portable: Signature, seed: int = 0
) -> list[Step | Feeds]:
    """Steps, or values by input (Feeds), of which onnxruntime may not take all. Raises UserError for inputs of which nothing
    can be drawn."""
    if of_source.caches:
        ours, theirs = Steps(source, of_source), Steps(portable, of_portable)
        known = [step for step in (*STEPS, *ours.all_fitting()) if theirs.fits(step)]
        return [step for step in dict.fromkeys(known) if ours.fits(step) or alone(step, ours, theirs)]
    found: dict[tuple, Feeds] = {}
    uneven = [(SIZES[0][0], *each) for each in APART] if is_uneven(source) else []
    for rows, length, apart in ((*SIZES[0], 0), *uneven, *((*each, 0) for each in SIZES[1:])):
        for feeds in make_feeds(source, SEED + seed, None, "graph", rows, length, apart):
            shapes = tuple(value.shape for value in feeds.values.values())
            title = ", ".join(dict.fromkeys("×".join(map(str, shape)) for shape in shapes if shape))
            found.setdefault(shapes, Feeds(f"inputs of {title}" if title else "no inputs", feeds.values, apart == 0))
    cases: list[Step | Feeds] = list(found.values())
    first = next(iter(found.values()))
    if any(_is_float(value) for value in first.values.values()):
        small = {name: value * SMALL if _is_float(value) else value for name, value in first.values.items()}
        cases.insert(1, Feeds(f"{first.name}, a hundredth as large", {n: np.asarray(v) for n, v in small.items()}))
    return [*cases[:1], *switched(first), *cases[1:]]


def is_uneven(source: onnx.ModelProto) -> bool:
    """Whether its inputs have several named dimensions that may differ, beside the batch."""
    weights = {tensor.name for tensor in source.graph.initializer}
    return len(open_lengths([value for value in source.graph.input if value.name not in weights])) > 1


def enough(done: Sequence[Step | Feeds]) -> bool:
    """Whether no further inputs of a graph without caches are to be compared."""
    return sum(isinstance(case, Feeds) and case.even for case in done) == ENOUGH


def alone(step: Step | Feeds, source: Steps, other: Steps) -> TypeGuard[Step]:
    """Whether the source is to take the rows of a step one by one, without padding, as those of a static cache stand: to a
    growing one padding may be slots like others."""
    if not isinstance(step, Step) or step.even:
        return False
    static = other.capacity is not None and source.signature != other.signature
    return static and not source.signature.static and all(map(source.fits, step.rows))


def why_not(model: onnx.ModelProto) -> str | None:
    """Why nothing can be compared of a graph."""
    drawn = next((node for node in model.graph.node if node.op_type in RANDOM), None)
    if drawn is not None:
        return f"{drawn.op_type} {drawn.name or drawn.output[0]} draws random numbers"
    untyped = next((value.name for value in model.graph.input if not value.type.HasField("tensor_type")), None)
    return f"the input {untyped} is not a tensor" if untyped else None


def _is_float(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"

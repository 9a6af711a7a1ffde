"""How far two outputs lie apart, and the first tensor of two graphs, in the order of computation, that does."""

from collections.abc import Callable, Collection

import ml_dtypes
import numpy as np
import onnx

from suture.core.network.inputs import Feeds
from suture.core.proof.steps import Step, Unrunnable
from suture.core.tolerances import marked, rounding_step

Run = Callable[[tuple[str, ...]], dict[str, np.ndarray]]  # a step, with these tensors among the outputs


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference as part of the largest value; infinite where the shapes or what is a number differ. Of what is
    rounded to 8 bits, what lies beyond one step of that counts."""
    if expected.shape != found.shape:
        return float("inf")
    step = rounding_step(marked(expected)) if expected.dtype in (np.int8, ml_dtypes.float8_e4m3fn) else 0.0
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return float("inf")
    difference = max(np.abs(expected[finite] - found[finite]).max(initial=0.0) - step, 0.0)
    return float(difference / (np.abs(expected)[finite].max(initial=0.0) or 1.0))


def first_difference(
    graph: onnx.GraphProto, known: Collection[str], runs: tuple[Run, Run], step: Step | Feeds, tolerance: float
) -> str:
    """The first tensor that `graph` computes and both `runs` give (those in `known`) differently, in words."""
    nodes = {name: node for node in graph.node for name in node.output if name and name in known}
    try:
        values = [run(tuple(nodes)) for run in runs]
    except Unrunnable as reason:
        return f"where is not known: {reason}"
    for name, node in nodes.items():
        expected, found = (_valid(each[name], step) if name in each else None for each in values)
        if expected is not None and found is not None and expected.shape == found.shape:
            error = relative_error(expected, found)
            if not error <= tolerance:
                return f"first at the {node.op_type} {node.name or '(no name)'}, whose output {name} differs by {error:.1e}"
    return "no intermediate tensor of the same name in both graphs differs"


def _valid(values: np.ndarray, step: Step | Feeds) -> np.ndarray | None:
    """The rows of a tensor inside that belong to tokens; None where there is padding and no telling."""
    if values.dtype.kind not in "fiub":
        return None
    if isinstance(step, Feeds) or step.even:
        return values
    new = step.valid[:, step.cached :]
    if values.shape[:2] == new.shape:
        return values[new]
    return values[new.ravel()] if values.ndim and values.shape[0] == new.size else None

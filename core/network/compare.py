"""onnxruntime against the parsed network: the largest error of each output, and the ONNX node where they first part.

An error is the largest absolute difference, divided by the largest value that the reference has there. Another shape
and a NaN, on either side or on both, are differences; of quantised outputs, what lies beyond one step of their rounding
counts. Intermediate tensors are looked at where an output differs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from suture.core.as_written import open_session
from suture.core.dtypes import BY_TENSORRT
from suture.core.network.description import Network
from suture.core.network.evaluate import Evaluator
from suture.core.network.inputs import Feeds
from suture.core.network.runner import to_numpy
from suture.core.sessions import run_arrays
from suture.core.tolerances import FLOAT, ROUNDED, SAME_GRAPH, marked, rounding_step
from suture.core.weights import load_graph, weights_root


@dataclass(frozen=True)
class Difference:
    """One tensor, in one set of inputs. `error` is None where there is none to give: `problem` says why."""

    tensor: str
    error: float | None
    problem: str | None = None

    def beyond(self, tolerance: float) -> bool:
        return self.error is None or not self.error <= tolerance


@dataclass(frozen=True)
class Divergence:
    """The first ONNX node, in the graph's order, of which an output differs: what it takes in agrees."""

    node: str
    op: str
    difference: Difference


@dataclass
class FeedsOutcome:
    """`problem`: why onnxruntime did not run these inputs; there are no outputs then."""

    feeds: str
    outputs: list[Difference]
    divergence: Divergence | None = None
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)  # by side, for run results
    problem: str | None = None


def default_tolerance(network: Network) -> float:
    """That of the network's coarsest dtype."""
    if any(layer.type == "QUANTIZE" for layer in network.layers):
        return ROUNDED
    dtypes = {BY_TENSORRT[tensor.dtype].onnx for tensor in network.tensors.values() if tensor.dtype in BY_TENSORRT}
    return max((SAME_GRAPH[dtype] for dtype in dtypes & SAME_GRAPH.keys()), default=SAME_GRAPH[FLOAT])


def compare(
    evaluate: Evaluator, reference: Path, feeds: Iterable[Feeds], tolerance: float, model: onnx.ModelProto | None = None
) -> list[FeedsOutcome]:
    """Runs each set of inputs on both. `reference` is the parsed file itself, or a graph with outputs and inputs of the
    same names that stands for it; only in the first case are intermediate tensors the same and compared. `model`: what is
    run in that file's place."""
    model = load_graph(reference) if model is None else model
    session = open_session(model, weights_root(reference), str(reference))
    outcomes = []
    for inputs in feeds:
        try:
            expected = _run(session, inputs.values)
        except Exception as error:  # onnxruntime's errors share no public base
            outcomes.append(FeedsOutcome(inputs.name, [], problem=f"onnxruntime does not run it: {_said(error)}"))
            continue
        found = {name: to_numpy(value) for name, value in evaluate(inputs.values).items()}
        outputs = [difference(name, expected[name], found.get(name)) for name in expected]
        outcome = FeedsOutcome(inputs.name, outputs, None, {"onnxruntime": expected, "network": found})
        same_file = reference.resolve() == evaluate.network.model.resolve()
        if same_file and any(output.beyond(tolerance) for output in outputs):
            outcome.divergence = _divergence(evaluate, model, reference, inputs, tolerance)
        outcomes.append(outcome)
    return outcomes


def difference(name: str, expected: np.ndarray, found: np.ndarray | None) -> Difference:
    if found is None:
        return Difference(name, None, "missing")
    if expected.shape != found.shape:
        return Difference(name, None, f"shape {list(found.shape)} instead of {list(expected.shape)}")
    step = 0.0
    if expected.dtype in (np.int8, ml_dtypes.float8_e4m3fn):
        step = rounding_step(marked(expected))
    wanted, got = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if np.isnan(wanted).any() or np.isnan(got).any():
        sides = [side for side, values in (("onnxruntime", wanted), ("network", got)) if np.isnan(values).any()]
        return Difference(name, None, f"NaN in {' and '.join(sides)}")
    with np.errstate(invalid="ignore"):
        distance = np.where(wanted == got, 0.0, np.maximum(np.abs(wanted - got) - step, 0.0))
    finite = np.abs(wanted[np.isfinite(wanted)])
    largest = float(finite.max(initial=0.0)) or 1.0
    error = float(distance.max(initial=0.0)) / largest
    return Difference(name, error) if np.isfinite(error) else Difference(name, None, "infinite on one side only")


def _divergence(evaluate: Evaluator, model: onnx.ModelProto, path: Path, inputs: Feeds, tolerance: float) -> Divergence | None:
    """Runs both again with every tensor that they have in common as an output."""
    tensors = evaluate.network.tensors
    common = [name for node in model.graph.node for name in node.output if name in tensors]
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in common if name not in known)
    expected = _run(open_session(wide, weights_root(path), str(path)), inputs.values)
    found = {name: to_numpy(value) for name, value in evaluate(inputs.values, keep=common).items()}
    for node in model.graph.node:  # in topological order, so the inputs of the first that differs agree
        for name in node.output:
            if name in found:
                own = difference(name, expected[name], found[name])
                if own.beyond(tolerance):
                    return Divergence(node.name or f"node_of_{node.output[0]}", node.op_type, own)
    return None


def _said(error: Exception) -> str:
    return " ".join(re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).split())


def _run(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of inputs only those that the graph has; bfloat16 as float32, which is what its shadow copy takes."""
    names = {value.name for value in session.get_inputs()}
    given = {
        name: value.astype(np.float32) if value.dtype.name == "bfloat16" else value
        for name, value in feeds.items()
        if name in names
    }
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, run_arrays(session, outputs, given)))

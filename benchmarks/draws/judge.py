"""A drawn graph: as it is and as surgery's portable graph in onnxruntime, and as TensorRT's network of the lowered one."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.draws.canvas import Canvas
from suture.core.errors import UserError
from suture.core.network.audit import audit
from suture.core.network.evaluate import EvaluationError, Evaluator, NotEvaluated
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import ParserDied, ParserProcess, ParserRefused
from suture.core.network.runner import to_numpy
from suture.core.onnx_checks import check_model
from suture.surgery.graph import Graph, files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.reports.report import SurgeryReport
from suture.surgery.runner import run_plan
from suture.surgery.verification import loads
from suture.surgery.verification.verify import ChangedOutput, State, Unrunnable, compare

# what may come of a draw; the last three are faults
INVALID, REFUSED, NOT_PARSED = "not run by onnxruntime", "refused by surgery", "refused by the parser"
NO_KERNEL = "without a kernel in onnxruntime at opset 24"
NAMED, NOT_EVALUATED, AGREES = "misread, and named", "not evaluated", "agrees"
CRASHED, PORTABLE_DIFFERS, NETWORK_DIFFERS = "crashed", "the portable graph differs", "the network differs"
FAULTS = (CRASHED, PORTABLE_DIFFERS, NETWORK_DIFFERS)
TIDYING = ("constants", "shapes", "duplicates", "node_names", "interface")  # passes that rewrite next to every graph
TOLERANCE = {np.dtype(np.float16): 2e-2}  # of the largest value
SIGMOID = 2.0**-22  # to which onnxruntime's is right, whatever the value
CAPACITY = 32


@dataclass(frozen=True)
class DrawVerdict:
    """`rewritten`: by which passes, but for those that tidy up."""

    result: str
    why: str = ""
    rewritten: tuple[str, ...] = ()


def judge(canvas: Canvas, parser: ParserProcess) -> DrawVerdict:
    source, feeds = canvas.model(), [] if canvas.decoder else canvas.feeds()
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"), TemporaryDirectory() as folder:
        try:
            expected = None if canvas.decoder else _run_all(source, feeds)
            check_model(source, "draw")
        except Exception as error:  # onnxruntime's errors and onnx's share no public base
            return DrawVerdict(INVALID, _line(error))
        try:
            graph = files.of_model(_copy(source), Path("draw"), Path())
            first = State(source, graph.signature, Path())
            portable, lowered, report = run_plan(graph, make_plan(SurgeryOptions(capacity=CAPACITY)))
            models = [files.without_shapes(files.to_model(each)) for each in (portable, lowered)]
            loads.check_written(models[0], "draw")
        except UserError as error:
            return DrawVerdict(REFUSED, str(error))
        except Exception as error:  # whatever it is, it is a fault of ours
            return DrawVerdict(CRASHED, f"{type(error).__name__}: {_line(error)}")
        done = _rewritten(report)
        if problem := _portable_problem(canvas, expected, feeds, first, portable, models[0]):
            kind, why = problem
            return DrawVerdict(kind, why, done)
        return _network(canvas, parser, Path(folder) / "draw.onnx", models, feeds, done)


def _portable_problem(canvas, expected, feeds, first: State, portable: Graph, model) -> tuple[str, str] | None:
    if canvas.decoder:
        try:
            first.outputs  # noqa: B018
        except Unrunnable as error:
            return INVALID, str(error)
        try:
            compare("surgery", first, first, State.of(portable))
        except (ChangedOutput, Unrunnable) as error:
            return PORTABLE_DIFFERS, str(error)
        return None
    try:
        found = _run_all(model, feeds, names=list(expected[0]))
    except Exception as error:  # as above
        kind = NO_KERNEL if re.search("NOT_IMPLEMENTED|data type is not supported", str(error)) else PORTABLE_DIFFERS
        return kind, f"does not run: {_line(error)}"
    problem = _difference(expected, found)
    return problem and (PORTABLE_DIFFERS, problem)


def _network(
    canvas: Canvas, parser: ParserProcess, path: Path, models: list, feeds: list, done: tuple[str, ...]
) -> DrawVerdict:
    portable, lowered = models
    onnx.save(lowered, path)
    try:
        network = parser.parse(path)
    except ParserRefused as refused:
        return DrawVerdict(NOT_PARSED, "; ".join(f"{each.operator}: {each.message}" for each in refused.refusals), done)
    except ParserDied as died:
        return DrawVerdict(NOT_PARSED, died.parts[1], done)
    if canvas.decoder:
        feeds = [each.values for each in make_feeds(portable)]
    elif canvas.axes == "one":
        feeds = feeds[-1:]
    try:
        expected = _run_all(portable, feeds)
        evaluate = Evaluator(network, "cpu")
        found = [{name: to_numpy(value) for name, value in evaluate(_for(network, each)).items()} for each in feeds]
    except NotEvaluated as unknown:
        return DrawVerdict(NOT_EVALUATED, unknown.parts[1], done)
    except EvaluationError as error:
        problem = error.parts[1]
    else:
        problem = _difference(expected, found, types=False)
    if problem is None:
        return DrawVerdict(AGREES, "", done)
    named = [str(finding) for finding in audit(network, lowered) if finding.severity == "error" or finding.kind == "misread"]
    return DrawVerdict(NAMED, named[0], done) if named else DrawVerdict(NETWORK_DIFFERS, problem, done)


def _for(network, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in feeds.items() if name in network.inputs}


def _run_all(model: onnx.ModelProto, feeds: list, names: list[str] | None = None) -> list[dict[str, np.ndarray]]:
    """The outputs for each set of inputs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = names or [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    return [dict(zip(names, session.run(names, {k: v for k, v in each.items() if k in taken}))) for each in feeds]


def _difference(expected: list, found: list, types: bool = True) -> str | None:
    for number, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        for name, values in wanted.items():
            if name not in got:
                return f"{name} is missing"
            other = got[name]
            if other.shape != values.shape or (types and other.dtype != values.dtype):
                return f"{name} is {other.dtype} {list(other.shape)} instead of {values.dtype} {list(values.shape)}"
            error = _error(values.astype(np.float64), other.astype(np.float64))
            if not error <= TOLERANCE.get(values.dtype, 1e-5 if values.dtype.kind == "f" else 0):
                return f"{name} differs by {error:.1e} of the largest value, in the inputs of number {number}"
    return None


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, of the largest value; infinite where NaN and infinity do not stand at the same places."""
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)) or not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    distance = np.abs(expected[finite] - found[finite]).max(initial=0) - SIGMOID
    return float(max(distance, 0) / (np.abs(expected[finite]).max(initial=0) or 1.0))


def _rewritten(report: SurgeryReport) -> tuple[str, ...]:
    return tuple(sorted({each.name for each in report.passes if each.matches and each.name not in TIDYING}))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

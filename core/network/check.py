"""One ONNX file held against TensorRT: what its parser refuses, drops and misreads, and whether what it made of the rest
computes what onnxruntime computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from suture.core.command import FOUND_DIFFERENCE, UNUSABLE_INPUT
from suture.core.errors import UserError
from suture.core.findings import Finding
from suture.core.network.attentions import Fusion, fusions
from suture.core.network.audit import audit
from suture.core.network.compare import FeedsOutcome, compare, default_tolerance
from suture.core.network.description import Network
from suture.core.network.evaluate import EvaluationError, Evaluator, NotEvaluated
from suture.core.network.graph_audit import audit_graph
from suture.core.network.inputs import Feeds, check_feeds, make_feeds, read_feeds, switched
from suture.core.network.parse import ParserProcess
from suture.core.network.refusals import RefusedNode, read_network
from suture.core.reader import status
from suture.core.repairs import load_repaired
from suture.core.shapes import ShapeRange, check_shapes
from suture.core.signature import Signature, find_signature
from suture.core.weights import load_graph, weights_root

SIZES = ((2, 8), (1, 8), (1, 1), (8, 8))  # rows, and other open dimensions: the first that onnxruntime takes
AGREES, WRONG, DIFFERENT, REFUSED, NOT_COMPARED = "agrees", "errors", "different", "refused", "not compared"


@dataclass
class CheckResult:
    """`refusals` has the nodes that the parser does not take (`all_read`: all of them); without any, `network` is what it
    made, `findings` what it dropped, misread or will run slowly, `attentions` which of them fuse, and `outcomes` the errors
    of each output for each set of inputs. `not_compared` says why there are no outcomes. `repairs` has what of a file that is
    not valid was repaired first, as surgery repairs it: all the rest is of the graph that this gives."""

    model: Path
    nodes: int
    tensorrt: str = ""
    refusals: list[RefusedNode] = field(default_factory=list)
    all_read: bool = True
    repairs: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    attentions: list[Fusion] = field(default_factory=list)
    outcomes: list[FeedsOutcome] = field(default_factory=list)
    tolerance: float = 0.0
    not_compared: str | None = None
    failed: str | None = None  # how the network's evaluation ends where onnxruntime's does not
    network: Network | None = field(default=None, repr=False)
    feeds: list[Feeds] = field(default_factory=list, repr=False)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def verdict(self) -> str:
        if self.refusals:
            return REFUSED
        differs = any(output.beyond(self.tolerance) for outcome in self.outcomes for output in outcome.outputs)
        if differs or self.failed:
            return DIFFERENT
        if self.errors:
            return WRONG
        return NOT_COMPARED if self.not_compared else AGREES

    @property
    def status(self) -> int:
        """As an exit status: 0; 1 for a difference or an error of the audit; 2 for a file that the parser refuses."""
        return {REFUSED: UNUSABLE_INPUT, DIFFERENT: FOUND_DIFFERENCE, WRONG: FOUND_DIFFERENCE}.get(self.verdict, 0)


def check(
    path: Path,
    *,
    shapes: dict[str, ShapeRange] | None = None,
    inputs: Path | None = None,
    reference: Path | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    plugins: Sequence[Path] = (),
) -> CheckResult:
    """Has TensorRT's parser read an ONNX file, reads the network that it makes beside the graph, and evaluates it against
    onnxruntime on the same file, or on `reference`: a graph with the same inputs and outputs that onnxruntime can run.

    `shapes`: of inputs with dynamic dimensions; each of min, opt and max is a set of inputs. `inputs`: an .npz file of
    them instead. `tolerance`: of the largest value; by default that of the network's types. Prints nothing. Raises
    UserError for a file that is not a graph, for inputs that do not fit it, and where TensorRT is missing.
    """
    path = Path(path)
    graph, repairs = load_repaired(path)
    _refuse_unrunnable(path, graph, reference)
    check_shapes(path, graph.graph.input, shapes or {})
    given = read_feeds(inputs) if inputs else None
    if inputs and given:
        check_feeds(inputs, graph, given[0])
    if reference is not None:
        load_graph(reference)
    for library in plugins:
        status(library, "name a plugin library with --plugin")
    result = CheckResult(path, len(graph.graph.node), repairs=repairs)
    with ParserProcess(plugins) as parser:
        result.network, result.refusals, result.all_read = read_network(parser, path, graph, not repairs)
    if result.network is None:
        return result
    network = result.network
    result.tensorrt, result.attentions = network.tensorrt, fusions(network)
    signature = _signature(graph)
    found = [*audit_graph(graph, weights_root(path), signature), *audit(network, graph, signature)]
    result.findings = sorted(found, key=lambda finding: finding.severity)
    result.tolerance = tolerance or default_tolerance(network)
    try:
        evaluate = Evaluator(network, graph=graph)
        for sizes in [()] if given else SIZES:  # a graph without names may take few lengths
            made = given or make_feeds(graph, seed, shapes, path, *sizes)
            result.feeds = made if given else [*made, *switched(made[0])]
            result.outcomes = compare(evaluate, reference or path, result.feeds, result.tolerance, None if reference else graph)
            if any(outcome.outputs for outcome in result.outcomes):
                break
        else:
            result.not_compared = result.outcomes[0].problem
    except NotEvaluated as unknown:
        result.not_compared = unknown.parts[1]
    except EvaluationError as error:
        result.failed = result.not_compared = error.parts[1]
    except UserError as error:
        result.not_compared = error.parts[1]
    return result


def _signature(graph: onnx.ModelProto) -> Signature | None:
    try:
        return find_signature(graph)
    except UserError:
        return None


def _refuse_unrunnable(path: Path, graph: onnx.ModelProto, reference: Path | None) -> None:
    own = next((node for node in graph.graph.node if node.op_type.startswith("TRT_")), None)
    if own is not None and reference is None:
        raise UserError(path, f"onnxruntime has no {own.op_type}", "give the graph that it was lowered from with --reference")

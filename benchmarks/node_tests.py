"""python -m benchmarks.node_tests [--only REGEX] [--out FILE]

ONNX's own node tests through TensorRT's parser and the network evaluator, against the outputs that onnx expects: what the
parser refuses, gets right, and silently gets wrong. Needs no GPU and takes two minutes. Writes docs/node_tests.md;
exit status 1 if a case differs for no reason that is known, or fails in the evaluator.
"""

import argparse
import importlib
import pkgutil
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test.case.node as onnx_cases

from suture.core.command import FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.network.description import Network
from suture.core.network.evaluate import Evaluator, NotEvaluated
from suture.core.network.parse import ParserDied, ParserProcess, ParserRefused
from suture.core.network.runner import to_numpy
from suture.core.progress import counted

REFUSED, AGREES, CONSTANT, DIFFERS = "refused", "agree", "agree with constants", "differ"
NOT_EVALUATED, FAILED = "not evaluated", "error"
RESULTS = (REFUSED, AGREES, CONSTANT, DIFFERS, NOT_EVALUATED, FAILED)
SMALL = 64  # elements of an input that a model would rather hold itself: axes, sizes, scales, depths
ROUNDING = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # of the largest value, beside onnx's own tolerance
OUT = Path(__file__).parents[1] / "docs" / "node_tests.md"
# what TensorRT's parser is known to take otherwise than ONNX means it, by the names of the cases that show it
KNOWN = {
    r"attention_4d.*nonpad": "`nonpad_kv_seqlen` is dropped: attention to the whole cache",
    r"attention_(local|bidirectional)_window": "the window's attributes are ignored: attention to all",
    r"attention.*fullymasked": "a row that may attend to nothing is not specified; ONNX has zeros",
    r"(average|max)pool_2d_ceil": "`ceil_mode` keeps a last window that starts in the padding; ONNX leaves it out",
    r"(lstm|gru|simple_rnn)_batchwise": "`layout` is ignored: the batch is taken for the sequence",
    r"quantizelinear(_axis)?$": "uint8 becomes int8: another range, and another type of the output",
    r"spacetodepth_crd": "the mode CRD is ignored: channels come in the order of DCR",
    r"resize_downsample_scales_(linear|cubic)_align_corners": "the corners are those of the whole output length, as in "
    "onnxruntime; ONNX's reference goes by length · scale",
    r"triu": "without `upper` the lower triangle is kept; ONNX's default is the upper",
    r"cast.*no_saturate": "`saturate` = 0 is ignored: what lies outside float8's range becomes its largest value",
}


@dataclass(frozen=True)
class NodeTestResult:
    case: str
    operator: str
    result: str
    why: str = ""


def node_tests(modules: Iterable[str] = (), only: str = "") -> list:
    """The cases in these modules of onnx.backend.test.case.node (all: half a minute), whose name matches."""
    names = list(modules) or [module.name for module in pkgutil.iter_modules(onnx_cases.__path__)]
    with warnings.catch_warnings(action="ignore"):  # of numpy, on the infinities that some cases are about
        for name in names:
            importlib.import_module(f"{onnx_cases.__name__}.{name}")
    return [case for case in onnx_cases._NodeTestCases if re.search(only, case.name)]


def run_cases(cases: Iterable) -> Iterator[NodeTestResult]:
    """One after another, in one parser process that is started again when a case ends it."""
    with ParserProcess() as parser, tempfile.TemporaryDirectory() as folder:
        for case in cases:
            path = Path(folder) / f"{case.name}.onnx"
            result, why = _run(case, case.model, path, parser)
            if result == REFUSED and (held := _with_constants(case)) is not None:
                again, reason = _run(case, held, path, parser)
                result, why = (result, why) if again == REFUSED else (CONSTANT if again == AGREES else again, reason)
            yield NodeTestResult(case.name, _operator(case), result, why)


def _with_constants(case) -> onnx.ModelProto | None:
    """The model with its small inputs, but the first, as initializers: TensorRT takes few axes and sizes as inputs. None
    if it has none such, or several sets of inputs."""
    inputs = case.data_sets[0][0]
    small = {place for place, value in enumerate(inputs) if place and isinstance(value, np.ndarray) and value.size <= SMALL}
    small = {place for place in small if inputs[place].dtype.kind in "biuf"}
    if not small or len(case.data_sets) > 1 or len(inputs) != len(case.model.graph.input):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for place in sorted(small, reverse=True):
        name = model.graph.input[place].name
        model.graph.initializer.append(onnx.numpy_helper.from_array(inputs[place], name))
        del model.graph.input[place]
    return model


def _run(case, model: onnx.ModelProto, path: Path, parser: ParserProcess) -> tuple[str, str]:
    """One of RESULTS, and why."""
    onnx.save(model, path)
    try:
        network = parser.parse(path)
    except ParserRefused as refused:
        return REFUSED, "; ".join(f"{refusal.operator}: {refusal.message}" for refusal in refused.refusals)
    except ParserDied as died:
        return REFUSED, died.parts[1]
    for inputs, outputs in case.data_sets:
        try:
            found = Evaluator(network, "cpu")(_feeds(case, inputs, network))
        except NotEvaluated as unknown:
            return NOT_EVALUATED, unknown.parts[1]
        except UserError as error:
            return FAILED, error.parts[1]
        for value, expected in zip(case.model.graph.output, outputs):
            if problem := difference(_array(expected), to_numpy(found[value.name]), case.rtol, case.atol):
                return DIFFERS, f"{value.name} {problem}"
    return AGREES, ""


def _feeds(case, inputs: list, network: Network) -> dict[str, np.ndarray]:
    """By the network's names, where it has as many inputs: the parser calls some as a loop's body does."""
    names = [value.name for value in case.model.graph.input]
    if len(names) == len(network.inputs):
        names = network.inputs
    return {name: _array(value) for name, value in zip(names, inputs)}


def _array(value) -> np.ndarray:
    return onnx.numpy_helper.to_array(value).copy() if isinstance(value, onnx.TensorProto) else np.array(value)


def difference(expected: np.ndarray, found: np.ndarray, rtol: float, atol: float) -> str | None:
    """What is wrong with `found`, None if nothing is. Both tolerances are onnx's, or what 16 bits round."""
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)} instead of {list(expected.shape)}"
    wanted, values = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    atol = max(atol, ROUNDING.get(expected.dtype.name, 0) * np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
    if np.allclose(values, wanted, rtol, atol, equal_nan=True):
        return None
    if (np.isfinite(values) != np.isfinite(wanted)).any():
        return "is finite in other places"
    return f"differs by {np.nanmax(np.abs(values - wanted)):.2g}"


def _operator(case) -> str:
    nodes = [node.op_type for node in case.model.graph.node]
    return nodes[0] if len(nodes) == 1 else "several nodes (functions written out)"


def known(result: NodeTestResult) -> str | None:
    """Why TensorRT's parser differs in this case, None if nobody has looked."""
    return next((why for pattern, why in KNOWN.items() if re.search(pattern, result.case)), None)


def table(results: list[NodeTestResult], version: str) -> str:
    """The page in docs."""
    counts = Counter(result.result for result in results)
    lines = [
        "# ONNX's node tests through TensorRT's parser",
        "",
        f"Made by `python -m benchmarks.node_tests` with {version} and onnx {onnx.__version__}: {len(results)} cases, "
        + ", ".join(f"{counts[kind]} {kind}" for kind in RESULTS)
        + ". The network that the parser makes is evaluated layer by layer and held against the outputs that onnx expects. "
        "*Agree with constants*: refused with its small inputs (axes, sizes, depths) as network inputs, right with them in the "
        "file. A case that is refused says so; one that differs builds and silently computes something else.",
        "",
        "## What differs",
        "",
        "| operator | cases | what the parser does |",
        "|---|---|---|",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.result == DIFFERS:
            key = result.operator, known(result) or f"open: {result.why}"
            reasons.setdefault(key, []).append(result.case.removeprefix("test_"))
    for (operator, why), cases in sorted(reasons.items()):
        lines.append(f"| {operator} | {len(cases)}: {', '.join(cases)} | {why} |")
    for kind in (NOT_EVALUATED, FAILED):
        lines += [f"\n{result.case}: {kind}: {result.why}" for result in results if result.result == kind]
    lines += ["", "## Operator by operator", "", f"| operator | {' | '.join(RESULTS)} | first refusal |", "|---" * 8 + "|"]
    for operator in sorted({result.operator for result in results}, key=str.lower):
        own = [result for result in results if result.operator == operator]
        numbers = [sum(result.result == kind for result in own) or "" for kind in RESULTS]
        refusal = next((result.why for result in own if result.result == REFUSED), "")
        lines.append(f"| {operator} | {' | '.join(map(str, numbers))} | {_cell(refusal)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:120]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.node_tests", description=__doc__.splitlines()[2])
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches, shown and not written (default: all)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUT, help="where the table goes (default: docs/)")
    options = parser.parse_args()
    cases = node_tests(only=options.only or "")
    results = list(counted("node tests", "cases", run_cases(cases), len(cases)))
    bad = [each for each in results if each.result == FAILED or (each.result == DIFFERS and known(each) is None)]
    for result in results if options.only else bad:
        print(f"{result.case}: {result.result} {result.why}")
    if not options.only:
        options.out.write_text(table(results, _version()))
    print(", ".join(f"{sum(result.result == kind for result in results)} {kind}" for kind in RESULTS))
    return FOUND_DIFFERENCE if bad else 0


def _version() -> str:
    with ParserProcess() as parser, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "version.onnx"
        onnx.save(onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'),
                  path)  # fmt: skip
        return parser.parse(path).tensorrt


if __name__ == "__main__":
    sys.exit(main())

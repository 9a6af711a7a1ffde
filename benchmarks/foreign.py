"""python -m benchmarks.foreign [FILE | FOLDER ...]

What becomes of ONNX files that others wrote, in one line: how many surgery fused, left with a reason, or refused, and of how many
it differs without having said so, or ends in a traceback. By default the files in ../shared/public and the graphs of other
exporters in tests/graphs. Each portable graph is compared with its source once more, on other inputs than those of the proof.
Needs no GPU and takes some minutes. With --each, a line for each file; exit status 1 for a traceback or a difference unsaid.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

import suture
from suture.core.command import FOUND_DIFFERENCE, CommandParser, run
from suture.core.errors import UserError
from suture.core.progress import counted
from suture.core.proof.prove import compare_two
from suture.core.proof.subject import Subject
from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN, DifferenceFound, PairVerdict
from suture.core.traits import STANDARD
from suture.surgery.operate import Operated
from tests.graphs import weightless

FUSED, KEPT, REFUSED, NOT_PARSED = (
    "fused",
    "with nothing to fuse, or the reason",
    "refused in one line",
    "refused by TensorRT's parser",
)
UNPROVEN, SAID = "not proven, with the reason", "a difference, said"
TRACEBACK, SILENT = "tracebacks", "silent differences"
RESULTS = (FUSED, KEPT, REFUSED, NOT_PARSED, UNPROVEN, SAID, TRACEBACK, SILENT)
OPERATORS = ("Attention", "LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Gelu", "Swish", "TensorScatter")
PUBLIC = Path(__file__).parents[2] / "shared" / "public"
OTHER_SEED = 1


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.foreign", description=__doc__.split("\n", 2)[2].strip())
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files, or folders of files")
    parser.add_argument("--each", action="store_true", help="print what became of each file")
    options = parser.parse_args()
    sources = list(_files(options.paths) if options.paths else _default())
    if not sources:
        raise UserError("benchmarks.foreign", "no ONNX files there", "name some")
    counts: Counter[str] = Counter()
    for name, source in counted("files", "judged", iter(sources), len(sources)):
        result, why = judge(source)
        counts[result] += 1
        if options.each or result in (TRACEBACK, SILENT):
            print(f"{name}: {result}{f' ({why})' if why else ''}")
    said = [f"{counts[result]} {result}" for result in RESULTS if counts[result] or result in (TRACEBACK, SILENT)]
    print(f"{len(sources)} files that others wrote: {', '.join(said)}")
    return FOUND_DIFFERENCE if counts[TRACEBACK] or counts[SILENT] else 0


def _files(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    for path in paths:
        yield from ((each.stem, each) for each in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path]))


def _default() -> Iterator[tuple[str, Path | onnx.ModelProto]]:
    yield from _files([PUBLIC])
    yield from ((name, weightless.load(name)) for name in weightless.names())


def judge(source: Path | onnx.ModelProto) -> tuple[str, str]:
    """One of RESULTS, and why."""
    try:
        operated = suture.operate(source)
    except UserError as error:
        return REFUSED, str(error)
    except DifferenceFound as error:
        return SAID, str(error)
    except Exception:  # whatever it is, it is a fault of ours
        return TRACEBACK, traceback.format_exc().splitlines()[-1]
    again = _again(operated)
    if again.status in (DIFFERENT, FAILED):
        return SILENT, again.said
    return _made(operated)


def _again(operated: Operated) -> PairVerdict:
    portable = Subject(operated.portable, operated.signature, operated.root)
    return compare_two(operated.source, portable, seed=OTHER_SEED)


def _made(operated: Operated) -> tuple[str, str]:
    for pair in operated.report.proof["pairs"]:
        if pair["status"] == FAILED:
            return NOT_PARSED, pair["reason"]
        if pair["status"] == NOT_RUN:
            return UNPROVEN, pair["reason"]
    before, after = (_standard(each) for each in (operated.source.model, operated.portable))
    fused = [f"{after[op]} {op}" for op in OPERATORS if after[op] > before[op]]
    return (FUSED, ", ".join(fused)) if fused else (KEPT, "; ".join(operated.report.lines()))


def _standard(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain in STANDARD)


if __name__ == "__main__":
    run("foreign", main)

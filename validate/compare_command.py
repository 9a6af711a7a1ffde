"""suture compare A.onnx B.onnx, as a command line. Imports nothing heavy before that is read."""

from pathlib import Path

from suture.core import arguments as typed
from suture.core.command import Parser, run
from suture.core.third_party import let_threads_sleep
from suture.validate.options import Options


def main(arguments: list[str] | None = None, prog: str = "compare") -> int:
    parser = Parser(prog=prog, description="Compare two graphs with KV caches, step by step, in onnxruntime.")
    parser.add_argument("reference", metavar="A.onnx", type=Path)
    parser.add_argument("candidate", metavar="B.onnx", type=Path)
    parser.add_argument("--tolerance", metavar="X", type=typed.tolerance, help="error allowed, of the largest value "
                        "(default: float32 1e-4, float16 2e-2)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=typed.seed, default=0, help="of the tokens drawn (default 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: none)")
    parser.add_argument("--force", action="store_true", help="with --out: run even if the report is up to date")
    given = parser.parse_args(arguments)
    if given.force and given.out is None:
        parser.error("--force says nothing without --out; leave it out")
    let_threads_sleep()
    from suture.validate.stage import validate_graphs  # only now: torch and onnxruntime take seconds

    options = Options(tolerance=given.tolerance, seed=given.seed)
    return validate_graphs(given.reference, given.candidate, options, given.out, given.force)


if __name__ == "__main__":
    run("compare", main)

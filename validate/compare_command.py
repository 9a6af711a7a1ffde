"""suture compare A.onnx B.onnx | REPORT_A REPORT_B, as a command line. Imports nothing heavy before that is read."""

from pathlib import Path

from suture.core import arguments as typed
from suture.core.command import CommandParser, run
from suture.core.command import given as is_given
from suture.core.third_party import let_threads_sleep
from suture.validate.options import ValidateOptions, add_result_options


def main(arguments: list[str] | None = None, prog: str = "compare") -> int:
    parser = CommandParser(prog=prog, description="Compare two graphs in onnxruntime, with KV caches or without, down to the "
                    "first tensor that differs; or two of validate's reports: what became worse.")  # fmt: skip
    parser.add_argument("reference", metavar="A.onnx | REPORT_A", type=Path)
    parser.add_argument("candidate", metavar="B.onnx | REPORT_B", type=Path)
    parser.add_argument("--tolerance", metavar="X", type=typed.tolerance, help="error allowed, of the largest value "
                        "(default: float32 1e-4 over steps, 1e-5 without caches; float16 2e-2)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=typed.seed, default=0, help="of the tokens drawn (default 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: none)")
    parser.add_argument("--force", action="store_true", help="with --out: run even if the report is up to date")
    add_result_options(parser)
    given = parser.parse_args(arguments)
    options = ValidateOptions(tolerance=given.tolerance, seed=given.seed, json=given.json, junit=given.junit)
    reports = [path.is_dir() or path.suffix == ".json" for path in (given.reference, given.candidate)]
    if any(reports):
        if not all(reports):
            parser.error("compares two graphs, or two reports: give two of a kind")
        if given.out or given.force or given.tolerance is not None or is_given(given, "seed"):
            parser.error("--out, --force, --tolerance and --seed say nothing with two reports; leave them out")
        from suture.validate.compare_reports import compare_reports

        return compare_reports(given.reference, given.candidate, options)
    if given.force and given.out is None:
        parser.error("--force says nothing without --out; leave it out")
    let_threads_sleep()
    from suture.validate.stage import validate_graphs  # only now: torch and onnxruntime take seconds

    return validate_graphs(given.reference, given.candidate, options, given.out, given.force)


if __name__ == "__main__":
    run("compare", main)

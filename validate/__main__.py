"""python -m validate DIR [--import RESULTS.npz | --save-golden DIR | --golden DIR] | REFERENCE.onnx CANDIDATE.onnx |
--network MODEL.onnx | --bundle DIR [--out DIR]"""

import argparse
import sys
from pathlib import Path

from suture.core.command import CommandParser, run
from suture.core.command import given as is_given
from suture.core.third_party import let_threads_sleep
from suture.validate.check_command import main as check
from suture.validate.options import add_options, add_result_options, from_arguments


def main(arguments: list[str] | None = None, prog: str = "validate") -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if "--network" in words:
        return check([word for word in words if word != "--network"], f"{prog} --network")
    parser = CommandParser(prog=prog, description="Check a pipeline's results, or compare two graphs with KV caches.")
    parser.add_argument("what", nargs="+", type=Path, metavar="DIR | REFERENCE.onnx CANDIDATE.onnx")
    add_options(parser)
    add_result_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report on two graphs goes (default: none)")
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    parser.add_argument("--network", action="store_true", help="compare what TensorRT's parser made of one graph with "
                        "onnxruntime on it")  # fmt: skip
    parser.add_argument("--bundle", action="store_true", help="write DIR/bundle (or --out), to run its engine on a machine "
                        "with a GPU")  # fmt: skip
    parser.add_argument("--import", metavar="RESULTS.npz", dest="results", type=Path, help="what the bundle's run.py wrote "
                        "there: level 4 of DIR's report")  # fmt: skip
    parser.add_argument("--reference", metavar="PORTABLE.onnx", type=Path, help="with --network: the graph that "
                        "onnxruntime runs instead (for one with TensorRT's custom operators)")  # fmt: skip
    parser.add_argument("--save-golden", metavar="DIR", type=Path, help="write what the exported graphs of a pipeline's folder "
                        "compute into DIR")  # fmt: skip
    parser.add_argument("--golden", metavar="DIR", type=Path, help="compare a pipeline's folder with what --save-golden wrote")
    parser.add_argument("--inputs", metavar="FILE.npz", type=Path, help="with --network: inputs by name")
    given = parser.parse_args(arguments)
    _refuse_without_effect(parser, given)
    options = from_arguments(given)
    what, *others = given.what
    let_threads_sleep()
    from suture.validate import stage  # only now: torch takes seconds

    if others:
        return stage.validate_graphs(what, *others, options, given.out, given.force)
    if given.bundle:
        return stage.bundle_pipeline(what, options, given.out)
    if given.save_golden:
        return stage.save_golden(what, given.save_golden, options, given.force)
    if given.golden:
        return stage.check_golden(what, given.golden, options)
    return stage.validate_pipeline(what, options, given.results, given.force)


def _refuse_without_effect(parser: CommandParser, options: argparse.Namespace) -> None:
    """Ends the command where an option does nothing in the form that is asked for."""
    forms = {  # and what each takes beside --tolerance and --seed
        "--network": {"reference", "inputs", "out"},
        "two graphs": {"out", "force", "json", "junit"} if options.out else {"out", "json", "junit"},
        "--bundle": {"text", "out"},
        "--save-golden": {"save_golden", "force"},
        "--golden": {"golden", "json", "junit"},
        "a pipeline's folder": {"text", "results", "force", "json", "junit"},
    }
    form = "--network" if options.network else "two graphs" if len(options.what) > 1 else "a pipeline's folder"
    if len(options.what) > (2 if form == "two graphs" else 1):
        parser.error("--network takes one graph" if options.network else "give one folder or two graphs")
    if options.bundle and form != "a pipeline's folder":
        parser.error(f"--bundle is of a pipeline's folder, and says nothing with {form}")
    chosen = [name for name in ("bundle", "save_golden", "golden") if getattr(options, name)]
    if len(chosen) > 1 or (chosen and form != "a pipeline's folder"):
        parser.error(f"--{chosen[0].replace('_', '-')} is of a pipeline's folder, and goes with no other such option")
    form = f"--{chosen[0].replace('_', '-')}" if chosen else form
    if options.golden and is_given(options, "seed"):
        parser.error("--seed says nothing with --golden, whose own counts; leave it out")
    for name in ("text", "results", "reference", "inputs", "out", "force", "json", "junit", "save_golden", "golden"):
        if getattr(options, name) not in (None, False) and name not in forms[form]:
            option = {"results": "import"}.get(name, name).replace("_", "-")
            parser.error(f"--{option} says nothing with {form}{' without --out' * (name == 'force')}; leave it out")
    if options.inputs is not None and is_given(options, "seed"):
        parser.error("--seed says nothing with --inputs, beside which nothing is drawn; leave one out")


if __name__ == "__main__":
    run("validate", main)

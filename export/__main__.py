"""python -m export --model NAME | --checkpoint DIR --out DIR [--dtype ...] [--weights copy|reference]"""

import argparse
from pathlib import Path

from suture.core.command import DONE, CommandParser, run
from suture.export.options import add_options, from_arguments


def main(arguments: list[str] | None = None, prog: str = "export") -> int:
    parser = CommandParser(prog=prog, description="Write a checkpoint as ONNX with its KV cache as inputs and outputs.")
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="of a model of several parts each goes to "
                        "DIR/PART/export")  # fmt: skip
    parser.add_argument("--pipeline", action="store_true", help=argparse.SUPPRESS)  # one part goes to DIR/export
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    given = parser.parse_args(arguments)
    from suture.export.stage import export  # only now: torch and transformers take seconds

    export(given.out, from_arguments(given), given.force, given.pipeline)
    return DONE


if __name__ == "__main__":
    run("export", main)

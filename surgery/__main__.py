"""python -m surgery MODEL.onnx --out DIR [--cache static|growing] [--capacity 2048] [--logits all|last] [--verify] ...
python -m surgery join A.onnx B.onnx --out DIR, python -m surgery capacity DIR --capacity N --out OTHER: modules of their own.
"""

import importlib
import sys
from pathlib import Path

from suture.core.command import CommandParser, run
from suture.surgery.options import add_cutting, add_options, from_arguments, refuse_without_effect

TOOLS = ("join", "capacity")  # suture.surgery.join, suture.surgery.capacity


def main(arguments: list[str] | None = None, prog: str = "surgery") -> int:
    tool, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if tool in TOOLS:
        return importlib.import_module(f"suture.surgery.{tool}").main(rest, f"{prog} {tool}")
    parser = CommandParser(prog=prog, description="Fuse a language model's graph and make its KV cache static.")
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    add_options(parser)
    add_cutting(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    given = parser.parse_args(arguments)
    refuse_without_effect(parser, given)
    from suture.surgery.stage import surgery  # only now: onnx and onnxruntime take a second

    return surgery(given.model, given.out, from_arguments(given), given.force)


if __name__ == "__main__":
    run("surgery", main)

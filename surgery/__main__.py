"""python -m surgery MODEL.onnx --out DIR [--cache static|growing] [--capacity 2048] [--logits all|last] [--verify] ...
python -m surgery join|capacity|ranks ...: tools on graphs that are finished, modules of their own.
"""

import importlib
import sys
from pathlib import Path

from suture.core import arguments as arguments_of
from suture.core.command import CommandParser, run
from suture.surgery.options import add_cutting, add_options, from_arguments, refuse_without_effect

TOOLS = ("join", "capacity", "ranks")  # suture.surgery.join ...: modules of their own


def main(arguments: list[str] | None = None, prog: str = "surgery") -> int:
    tool, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if tool in TOOLS:
        return importlib.import_module(f"suture.surgery.{tool}").main(rest, f"{prog} {tool}")
    parser = CommandParser(prog=prog, description="Fuse a language model's graph and make its KV cache static.")
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    add_options(parser)
    add_cutting(parser)
    parser.add_argument("--tensor-parallel", metavar="N", type=arguments_of.whole(2, 64), help="also write the graphs of N GPUs "
                        "into DIR/ranks, as `ranks` does from what is finished")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    given = parser.parse_args(arguments)
    refuse_without_effect(parser, given)
    from suture.surgery.stage import surgery  # only now: onnx and onnxruntime take a second

    status = surgery(given.model, given.out, from_arguments(given), given.force)
    if status or given.tensor_parallel is None:
        return status
    from suture.surgery.parallel.stage import make_ranks

    ranks = given.tensor_parallel
    return make_ranks(given.out, given.out / "ranks", ranks, tuple(given.own), given.no_verify, given.force)


if __name__ == "__main__":
    run("surgery", main)

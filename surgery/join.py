"""python -m suture.surgery.join A.onnx B.onnx --out DIR: outputs of one graph to inputs of another.

Imports nothing heavy before that is read; suture.surgery.connect does it.
"""

from pathlib import Path

from suture.core import arguments
from suture.core.command import CommandParser, run


def main(line: list[str] | None = None, prog: str = "surgery.join") -> int:
    parser = CommandParser(prog=prog, description="Make one graph of two: outputs of A are inputs of B.")
    parser.add_argument("first", metavar="A.onnx", type=Path)
    parser.add_argument("second", metavar="B.onnx", type=Path)
    parser.add_argument("--connect", metavar="OUTPUT=INPUT", type=arguments.pair, action="append", default=[],
                        help="an output of A that is an input of B under another name; may be repeated")  # fmt: skip
    parser.add_argument("--rename", metavar="NAME=NEW", type=arguments.pair, action="append", default=[],
                        help="what an input or output of B is called in the result; may be repeated")  # fmt: skip
    parser.add_argument("--keep", metavar="OUTPUT", action="append", default=[],
                        help="an output of A that stays one though B reads it; may be repeated")  # fmt: skip
    parser.add_argument(
        "--no-verify", action="store_true", help="leave out the proof: the result against A and then B, on small inputs"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(line)
    from suture.surgery.connect import Connection, connect  # only now: onnx and onnxruntime take a second

    connection = Connection(tuple(options.connect), tuple(options.rename), tuple(options.keep), options.no_verify)
    return connect(options.first, options.second, options.out, connection, options.force)


if __name__ == "__main__":
    run("surgery.join", main)

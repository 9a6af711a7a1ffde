"""python -m surgery ranks DIR|MODEL.onnx --tensor-parallel N --out DIR: a finished graph as one graph for each of N GPUs.

Imports nothing heavy before that is read; suture.surgery.parallel does it.
"""

from pathlib import Path

from suture.core import arguments
from suture.core.command import CommandParser, run

RANKS = arguments.whole(2, 64)


def main(line: list[str] | None = None, prog: str = "surgery.ranks") -> int:
    parser = CommandParser(prog=prog, description="Divide a finished graph among GPUs: heads, caches and inner widths of MLPs.")
    parser.add_argument("model", metavar="DIR|MODEL.onnx", type=Path, help="what surgery wrote, or its portable graph")
    parser.add_argument("--tensor-parallel", metavar="N", type=RANKS, required=True, help="how many GPUs")
    parser.add_argument("--pass", metavar="FILE.py[@PASS]", dest="own", action="append", default=[],
                        help="each pass of your own that it was made with; may be repeated")  # fmt: skip
    parser.add_argument(
        "--no-verify", action="store_true", help="leave out the proof: all ranks together against the whole graph"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(line)
    from suture.surgery.parallel.stage import make_ranks  # only now: onnx and onnxruntime take a second

    return make_ranks(options.model, options.out, options.tensor_parallel, tuple(options.own), options.no_verify, options.force)


if __name__ == "__main__":
    run("surgery.ranks", main)

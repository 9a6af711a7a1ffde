"""python -m surgery ranks DIR --tensor-parallel N|--stages N --out OTHER: a finished graph as one graph for each of N GPUs.

Imports nothing heavy before that is read; suture.surgery.parallel does it.
"""

from pathlib import Path

from suture.core import arguments
from suture.core.command import CommandParser, run

RANKS = arguments.whole(2, 64)


def main(line: list[str] | None = None, prog: str = "surgery.ranks") -> int:
    parser = CommandParser(
        prog=prog, description="Divide a finished graph among GPUs: heads, caches and inner widths of MLPs, or layers."
    )
    parser.add_argument(
        "model", metavar="DIR|MODEL.onnx", type=Path, help="what surgery wrote, or, without --stages, its portable graph"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--tensor-parallel", metavar="N", type=RANKS, help="every layer divided among N GPUs, which add up twice a layer"
    )
    how.add_argument("--stages", metavar="N", type=RANKS, help="cut at layers into N graphs, for models that fit no single GPU")
    parser.add_argument("--pass", metavar="FILE.py[@PASS]", dest="own", action="append", default=[],
                        help="each pass of your own that it was made with; may be repeated")  # fmt: skip
    parser.add_argument(
        "--no-verify", action="store_true", help="leave out the proof: all ranks together against the whole graph"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(line)
    if options.stages is not None:
        if options.own:
            parser.error("--stages cuts the lowered graph that is there; leave --pass out")
        from suture.surgery.parallel.cut import make_stages

        return make_stages(options.model, options.out, options.stages, options.no_verify, options.force)
    from suture.surgery.parallel.stage import make_ranks  # only now: onnx and onnxruntime take a second

    return make_ranks(options.model, options.out, options.tensor_parallel, tuple(options.own), options.no_verify, options.force)


if __name__ == "__main__":
    run("surgery.ranks", main)

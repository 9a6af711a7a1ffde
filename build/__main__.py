"""python -m build MODEL.trt.onnx --out DIR: model.engine, engine.json and kernels.json."""

from pathlib import Path

from suture.build.options import add_options, from_arguments
from suture.core.command import DONE, CommandParser, run


def main(arguments: list[str] | None = None, prog: str = "build") -> int:
    parser = CommandParser(prog=prog, description="Build a TensorRT engine of a lowered graph, and say what it will cost.")
    parser.add_argument("model", type=Path, metavar="MODEL.trt.onnx", help="the lowered graph that surgery wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="build even if the results are up to date")
    add_options(parser)
    given = parser.parse_args(arguments)
    from suture.build.stage import build  # only now: onnx takes a second

    build(given.model, given.out, from_arguments(given), given.force)
    return DONE


if __name__ == "__main__":
    run("build", main)

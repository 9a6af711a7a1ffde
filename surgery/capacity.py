"""python -m suture.surgery.capacity DIR|MODEL.onnx --capacity N --out DIR: a finished graph with another number of cache slots."""

from pathlib import Path

from suture.core import arguments
from suture.core.command import Parser, run


def main(line: list[str] | None = None) -> None:
    parser = Parser(prog="surgery.capacity", description="Change how many slots a finished graph's KV cache has.")
    parser.add_argument("model", metavar="DIR|MODEL.onnx", type=Path, help="what surgery wrote, or its portable graph")
    parser.add_argument("--capacity", type=arguments.slots, required=True, help="slots of the static cache")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(line)
    from suture.surgery.resize import change_capacity  # only now: onnx and graph-surgeon take most of a second

    change_capacity(options.model, options.capacity, options.out, options.force)


if __name__ == "__main__":
    run("surgery.capacity", main)

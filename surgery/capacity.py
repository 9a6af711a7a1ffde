"""python -m suture.surgery.capacity DIR|MODEL.onnx --capacity N --out DIR: a finished graph with another number of cache slots.

Imports nothing heavy before that is read; suture.surgery.resize does it.
"""

from pathlib import Path

from suture.core import arguments
from suture.core.command import DONE, CommandParser, run


def main(line: list[str] | None = None, prog: str = "surgery.capacity") -> int:
    parser = CommandParser(prog=prog, description="Change how many slots a finished graph's KV cache has.")
    parser.add_argument("model", metavar="DIR|MODEL.onnx", type=Path, help="what surgery wrote, or its portable graph")
    parser.add_argument("--capacity", type=arguments.slots, required=True, help="slots of the static cache")
    parser.add_argument("--pass", metavar="FILE.py[@PASS]", dest="own", action="append", default=[],
                        help="each pass of your own that it was made with; may be repeated")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="run even if the results are up to date")
    options = parser.parse_args(line)
    from suture.surgery.resize import change_capacity  # only now: onnx and onnxruntime take a second

    change_capacity(options.model, options.out, options.capacity, tuple(options.own), options.force)
    return DONE


if __name__ == "__main__":
    run("surgery.capacity", main)

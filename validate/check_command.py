"""suture check MODEL.onnx, as a command line. Imports nothing heavy before that is read."""

from pathlib import Path

from suture.core import arguments as typed
from suture.core.command import CommandParser, given, run
from suture.validate.options import add_result_options


def main(arguments: list[str] | None = None, prog: str = "check") -> int:
    """Reads the command line (sys.argv by default) and checks one file. Returns the exit status."""
    parser = CommandParser(prog=prog, description="What TensorRT's parser drops, misreads or refuses of an ONNX file, and whether "
                    "its network computes what onnxruntime computes. Exit status: 0 it does, 1 it does not, 2 refused.")  # fmt: skip
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.inputs is not None and given(options, "seed"):
        parser.error("--seed says nothing with --inputs, beside which nothing is drawn; leave one out")
    from suture.validate.check import run_check  # only now: torch and onnxruntime take seconds

    return run_check(options)


def add_options(parser: typed.Container) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=2x128", help="shape of an input, or "
                        "NAME=1x1,1x128,4x512 (min, opt, max), of which each is checked; once for each input")  # fmt: skip
    parser.add_argument("--inputs", metavar="FILE.npz", type=Path, help="inputs by name (default: valid random ones)")
    parser.add_argument("--reference", metavar="PORTABLE.onnx", type=Path, help="the graph that onnxruntime runs instead "
                        "(for one with TensorRT's custom operators)")  # fmt: skip
    parser.add_argument("--tolerance", metavar="X", type=typed.tolerance, help="error allowed, of the largest value (default: float32 "
                        "1e-5, float16 1e-2, bfloat16 5e-2)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=typed.seed, default=0, help="of the inputs drawn (default 0)")
    parser.add_argument("--plugin", metavar="LIB", type=Path, action="append", default=[], help="plugin library for "
                        "operators that TensorRT lacks; such layers are not evaluated")  # fmt: skip
    parser.add_argument("--save", metavar="NET.json", type=Path, help="write the network and its outputs")
    parser.add_argument("--against", metavar="NET.json", type=Path, help="name what differs from a saved network, of another "
                        "TensorRT version for instance")  # fmt: skip
    add_result_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for network.json and Polygraphy's run results")


if __name__ == "__main__":
    run("check", main)

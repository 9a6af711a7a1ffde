"""What build can be asked for, and how its command line takes it. Imports nothing heavy: pipeline.py reads it for
--help."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from suture.build import flavour
from suture.core import arguments

MAX_PAST = 2048  # tokens in a growing cache


@dataclass(frozen=True)
class BuildOptions:
    """What build is asked for; each is the option of its name (docs/building.md).

    tensorrt             "auto", "standard" or "rtx"
    compute_capability   GPUs to build for, such as "8.9"; rtx only
    weights              "constant", or "input": bound from their own files
    profiles             "two", one for decoding and one for prompts, or "one"
    max_batch            sequences
    max_prompt           tokens of one step or sequence (default: 512, or the cache's capacity if less)
    max_past             tokens in a growing cache (default: MAX_PAST); a static one has its capacity
    shape                NAME=min,opt,max of inputs (core/shapes.py), or @FILE with one a line
    plugin               libraries of TensorRT plugins that the graph needs
    """

    tensorrt: str = "auto"
    compute_capability: tuple[str, ...] | None = None
    weights: str = "constant"
    profiles: str = "two"
    max_batch: int = 4
    max_prompt: int | None = None
    max_past: int | None = None
    shape: tuple[str, ...] = ()
    plugin: tuple[Path, ...] = ()


def from_arguments(given: argparse.Namespace) -> BuildOptions:
    capabilities = given.compute_capability
    return BuildOptions(
        given.tensorrt, capabilities and tuple(capabilities), given.weights, given.profiles, given.max_batch, given.max_prompt,
        given.max_past, tuple(given.shape), tuple(given.plugin),
    )  # fmt: skip


def add_options(parser: arguments.Container, weights: str = "--weights") -> None:
    """`weights`: what the weights' option is called, where another stage's options stand beside these."""
    parser.add_argument("--tensorrt", choices=["auto", "standard", "rtx"], default="auto",
                        help="which TensorRT; auto: standard where it is installed beside a GPU, else rtx")  # fmt: skip
    parser.add_argument("--compute-capability", nargs="+", type=arguments.capability, metavar="X.Y",
                        help=f"GPUs to build for, rtx only (default: {' '.join(flavour.RTX_DEFAULT)})")  # fmt: skip
    parser.add_argument(weights, choices=["constant", "input"], default="constant",
                        help="weights inside the engine, or as inputs that are bound from their own files")  # fmt: skip
    parser.add_argument("--profiles", choices=["two", "one"], default="two",
                        help="two: one for decoding and one for prompts; one: both in one (default: two)")  # fmt: skip
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=1x1,1x128,4x512",
                        help="an input's smallest, most usual and largest shape, or its only one, or @FILE with one a line; "
                        "dimensions of the same name follow; may be repeated (default: by what the input is for)")  # fmt: skip
    parser.add_argument("--plugin", action="append", default=[], type=Path, metavar="LIB.so",
                        help="a library of TensorRT plugins that the graph needs; may be repeated")  # fmt: skip
    parser.add_argument("--max-batch", type=arguments.rows, default=4, metavar="N", help="sequences (default: 4)")
    parser.add_argument("--max-prompt", type=arguments.slots, metavar="N",
                        help="tokens of one step or sequence (default: 512, or the cache's capacity if less)")  # fmt: skip
    parser.add_argument("--max-past", type=arguments.slots, metavar="N",
                        help=f"tokens in a growing cache; a static one has its capacity (default: {MAX_PAST})")  # fmt: skip

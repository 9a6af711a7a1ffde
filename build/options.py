"""What build's command line takes. Imports nothing heavy: suture/pipeline.py reads it for --help."""

import argparse

from suture.build import flavour
from suture.core import arguments


def add_options(parser: argparse.ArgumentParser, weights: str = "--weights") -> None:
    """`weights`: what the weights' option is called, where another stage's options stand beside these."""
    parser.add_argument("--tensorrt", choices=["auto", "standard", "rtx"], default="auto",
                        help="which TensorRT; auto: standard where it is installed beside a GPU, else rtx")  # fmt: skip
    parser.add_argument("--compute-capability", nargs="+", type=arguments.capability, metavar="X.Y",
                        help=f"GPUs to build for, rtx only (default: {' '.join(flavour.RTX_DEFAULT)})")  # fmt: skip
    parser.add_argument(weights, choices=["constant", "input"], default="constant",
                        help="weights inside the engine, or as inputs that are bound from their own files")  # fmt: skip
    parser.add_argument("--profiles", choices=["two", "one"], default="two",
                        help="two: one for decoding and one for prompts; one: both in one (default: two)")  # fmt: skip
    parser.add_argument("--max-batch", type=arguments.rows, default=4, metavar="N", help="sequences (default: 4)")
    parser.add_argument("--max-prompt", type=arguments.slots, metavar="N",
                        help="tokens of one step (default: 512, or the cache's capacity if less)")  # fmt: skip
    parser.add_argument("--max-past", type=arguments.slots, default=2048, metavar="N",
                        help="tokens in a growing cache; a static one has its capacity (default: 2048)")  # fmt: skip

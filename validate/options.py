"""What validate's command line takes on a pipeline's folder. Imports nothing heavy: suture/pipeline.py reads it for --help."""

import argparse
from pathlib import Path

from suture.core import arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to read (default: the checkpoint's heldout)")
    parser.add_argument("--tolerance", metavar="X", type=arguments.tolerance, help="error allowed, of the largest value "
                        "(default: float32 1e-4, float16 2e-2)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=arguments.seed, default=0, help="of the tokens drawn (default 0)")

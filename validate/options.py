"""What validate can be asked for, and how its command line takes it. Imports nothing heavy: pipeline.py reads it for
--help."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from suture.core import arguments

STDOUT = Path("-")


@dataclass(frozen=True)
class ValidateOptions:
    """`text`: a file to read, of a pipeline (default: the checkpoint's heldout.txt). `tolerance`: of the largest value
    (default: by dtype). `seed`: of the tokens drawn. `json`, `junit`: files for the result, STDOUT for standard output."""

    text: Path | None = None
    tolerance: float | None = None
    seed: int = 0
    json: Path | None = None
    junit: Path | None = None


def from_arguments(given: argparse.Namespace) -> ValidateOptions:
    return ValidateOptions(given.text, given.tolerance, given.seed, given.json, given.junit)


def add_result_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, nargs="?", const=STDOUT, help="the result as JSON; to standard "
                        "output, and nothing else there, without FILE")  # fmt: skip
    parser.add_argument("--junit", metavar="FILE", type=Path, help="the result as JUnit XML")


def add_options(parser: arguments.Container) -> None:
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to read (default: the checkpoint's heldout.txt)")
    parser.add_argument("--tolerance", metavar="X", type=arguments.tolerance, help="error allowed, of the largest value "
                        "(default: float32 1e-4, float16 2e-2)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=arguments.seed, default=0, help="of the tokens drawn (default 0)")

"""What export's command line takes. Imports nothing heavy: suture/pipeline.py reads it for --help."""

import argparse
from pathlib import Path

from suture.core.dtypes import FLOAT_NAMES


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a checkpoint that comes with the project, such as tiny-qwen, or a "
                        "model's dimensions with random weights, such as llama-2-7b")  # fmt: skip
    source.add_argument("--checkpoint", metavar="DIR", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("--dtype", choices=FLOAT_NAMES, help="of weights and arithmetic (default: the checkpoint's own)")
    parser.add_argument(
        "--weights",
        choices=("copy", "reference"),
        help="copy beside the graph, or refer to the checkpoint's files (default: copy below 2 GB)",
    )

"""What export can be asked for, and how its command line takes it. Imports nothing heavy: pipeline.py reads it for
--help."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from suture.core import arguments

DTYPES = ("float32", "float16", "bfloat16")  # core.dtypes.FLOAT_NAMES, which takes onnx to import


@dataclass(frozen=True)
class ExportOptions:
    """One of `checkpoint`, a folder with config.json and safetensors, and `model`, the name of one that comes along.

    dtype     of weights and arithmetic, one of DTYPES (default: the checkpoint's own)
    weights   "copy" beside the graph, or "reference" to the checkpoint's files (default: copy below 2 GB)
    part      of a model of several parts this one alone
    lora      the folder of a LoRA adapter, as peft saves it, to be merged into the weights
    picture   height and width in pixels that a vision tower's graph takes, where it could take any (default: 448 each way)
    """

    model: str | None = None
    checkpoint: Path | None = None
    dtype: str | None = None
    weights: str | None = None
    part: str | None = None
    lora: Path | None = None
    picture: tuple[int, int] | None = None


def from_arguments(given: argparse.Namespace) -> ExportOptions:
    picture = given.picture_size and arguments.size(given.picture_size)
    return ExportOptions(given.model, given.checkpoint, given.dtype, given.weights, given.part, given.lora, picture)


def _size(text: str) -> str:
    """HxW, checked and kept as it is: the pipeline hands it on."""
    arguments.size(text)
    return text


def add_options(parser: arguments.Container) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a checkpoint that comes with the project, such as tiny-qwen, or a "
                        "model's dimensions with random weights, such as llama-2-7b")  # fmt: skip
    source.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a folder with config.json and safetensors, or ORG/NAME on the Hugging Face Hub",
    )
    parser.add_argument("--lora", metavar="DIR", type=Path, help="a LoRA adapter as peft saves it, merged into the weights")
    parser.add_argument("--part", metavar="NAME", help="of a model of several parts this one alone, into --out itself")
    parser.add_argument("--picture-size", metavar="HxW", type=_size, help="of a vision tower that takes any: what its graph takes, in "
                        "pixels (default: 448x448)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and arithmetic (default: the checkpoint's own)")
    parser.add_argument(
        "--weights",
        choices=("copy", "reference"),
        help="copy beside the graph, or refer to the checkpoint's files (default: copy below 2 GB)",
    )

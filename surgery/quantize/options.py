"""The part of surgery's command line that is about quantisation."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suture.core import arguments
from suture.core.command import given
from suture.core.errors import UserError
from suture.surgery.quantize.formats import BLOCKS, CACHES, FORMATS, HEADS, TABLES

if TYPE_CHECKING:
    from suture.surgery.options import SurgeryOptions


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    format: str | None
    group_size: int = 128
    exclude: tuple[str, ...] = ()
    lm_head: str = "int8"
    embedding: str = "none"
    kv_cache: str = "none"
    calibration: Path | None = None
    tokenizer: Path | None = None

    @property
    def calibrated(self) -> bool:
        return self.kv_cache != "none" or (self.format is not None and FORMATS[self.format].calibrated)

    def __str__(self) -> str:
        parts = []
        if self.format:
            blocks = f" in blocks of {self.group_size}" if FORMATS[self.format].blocks else ""
            parts = [f"{self.format}{blocks}", f"lm_head {self.lm_head}", f"embedding {self.embedding}"]
        return ", ".join(parts + [f"cache {self.kv_cache}"] * (self.kv_cache != "none"))


def add_options(parser: arguments.Container) -> None:
    parser.add_argument("--quantize", choices=FORMATS, help="store the products' weights in fewer bits (docs/quantisation.md)")
    parser.add_argument("--kv-cache", choices=CACHES, default="none", help="a growing cache, quantised (%(default)s)")
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="text that formats are fitted to (one comes along)")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="of that text (default: of the exported checkpoint)")
    parser.add_argument(
        "--group-size", type=int, default=128, choices=BLOCKS, help="weights to a scale, of 4 bits (%(default)s)"
    )
    parser.add_argument("--exclude", metavar="PATTERN", action="append", default=[],
                        help="leave weights of such names (with * and ?) as they are; may be repeated")  # fmt: skip
    parser.add_argument("--lm-head", choices=HEADS, default="int8", help="the vocabulary's product, quantised (%(default)s)")
    parser.add_argument("--embedding", choices=TABLES, default="none", help="the table of embeddings, quantised (%(default)s)")


def refuse_without_effect(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where an option does nothing beside the others."""
    calibrated = options.quantize is not None and FORMATS[options.quantize].calibrated
    if options.quantize is None:
        for name in ("group_size", "lm_head", "embedding", "exclude"):
            if given(options, name) or (options.exclude and name == "exclude"):
                parser.error(f"--{name.replace('_', '-')} says nothing without --quantize; add --quantize FORMAT")
    for name in ("calibration", "tokenizer"):
        if getattr(options, name) is not None and not calibrated and options.kv_cache == "none":
            what = f"--quantize {options.quantize} is fitted to no text" if options.quantize else "nothing is quantised"
            parser.error(f"--{name} says nothing where {what}; leave it out")


def read_request(options: "SurgeryOptions") -> Request | None:
    """None where nothing is to be quantised. Raises UserError for options that have no meaning together."""
    if options.quantize is None:
        given = [name for name in ("exclude", "embedding") if getattr(options, name) not in ((), "none")]
        if given:
            raise UserError(f"--{given[0]}", "says nothing without --quantize", "add --quantize FORMAT")
        if options.kv_cache == "none":
            return None
    if options.kv_cache != "none" and options.cache == "static":
        raise UserError(f"--kv-cache {options.kv_cache}", "TensorRT updates only floats in place", "add --cache growing")
    return Request(
        options.quantize, options.group_size, options.exclude, options.lm_head, options.embedding,
        options.kv_cache, options.calibration, options.tokenizer,
    )  # fmt: skip

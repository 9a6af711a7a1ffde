"""What surgery can be asked for, and how its command line takes it. Imports nothing heavy: pipeline.py reads it for
--help."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from suture.core import arguments
from suture.core.command import given
from suture.surgery.quantize import options as quantising


@dataclass(frozen=True)
class SurgeryOptions:
    """What surgery is asked for; each is the option of its name (docs/surgery.md).

    cache         "static": of fixed capacity, written in place. "growing": as it comes
    capacity      slots of a static cache
    logits        "all" tokens', or those of each sequence's "last" valid one
    merge         weights of each layer that become one: "qkv", "gate-up"
    attention     what hides the rest of a static cache in the lowered graph: a "mask", or "lengths"
    onnxruntime   whether to make the form in onnxruntime's contrib operators, too
    skip          names of passes to leave out
    own           passes of the user's: FILE.py, or FILE.py@PASS, to run after PASS
    no_verify     whether to leave out the proof of what is written: source against portable, portable against lowered graph
    verify        whether to compare the graph before and after each pass, too, and to prove all layers of a large graph;
                  `bisect`: and find the first match that differs
    branch        of a graph that is one If: the branch to take out, "then", "else" or "past"
    once          groups of inputs that change rarely: what depends on one group alone is cut into a graph of its own
    past          a regular expression for the inputs that are caches; `named`: ROLE=NAME of other inputs and outputs
    quantize ...  docs/quantisation.md
    """

    cache: str = "static"
    capacity: int = 2048
    logits: str = "all"
    merge: tuple[str, ...] = ()
    attention: str = "mask"
    onnxruntime: bool = False
    skip: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    no_verify: bool = False
    verify: bool = False
    bisect: bool = False
    branch: str | None = None
    once: tuple[tuple[str, ...], ...] = ()
    past: str | None = None
    named: tuple[str, ...] = ()
    quantize: str | None = None
    kv_cache: str = "none"
    calibration: Path | None = None
    tokenizer: Path | None = None
    group_size: int = 128
    exclude: tuple[str, ...] = ()
    lm_head: str = "int8"
    embedding: str = "none"

    @property
    def roles(self) -> dict[str, str]:
        """`named` as role: name."""
        return dict(each.split("=", 1) for each in self.named)


def from_arguments(given: argparse.Namespace | Mapping) -> SurgeryOptions:
    """What a command line says, or what a manifest records; what neither has is as it is by default."""
    values = given if isinstance(given, Mapping) else vars(given)
    known = {field.name: values[field.name] for field in fields(SurgeryOptions) if field.name in values}
    return SurgeryOptions(**{name: _unchangeable(value) for name, value in known.items()})


def _unchangeable(value: object) -> object:
    """A list as a tuple, and lists in it."""
    return tuple(map(_unchangeable, value)) if isinstance(value, list) else value


def add_options(parser: arguments.Container) -> None:
    parser.add_argument("--cache", choices=("static", "growing"), default="static", help="the KV cache's form (%(default)s)")
    parser.add_argument("--capacity", type=arguments.slots, default=2048, help="slots of a static cache (%(default)s)")
    parser.add_argument("--logits", choices=("all", "last"), default="all", help="of every token or the last (%(default)s)")
    parser.add_argument("--merge", choices=("qkv", "gate-up"), nargs="+", default=[],
                        help="merge these weights of each layer: by reference where they follow one another in "
                        "a file, else in a new one that then holds all weights")  # fmt: skip
    parser.add_argument("--attention", choices=("mask", "lengths"), default="mask",
                        help="what hides the rest of a static cache in the lowered graph (%(default)s); "
                        "lengths is silently wrong on some GPUs")  # fmt: skip
    parser.add_argument("--onnxruntime", action="store_true", help="also write model.ort.onnx, in onnxruntime's contrib operators: "
                        "quicker than the portable graph on its CUDA provider")  # fmt: skip
    parser.add_argument("--skip", metavar="PASS", action="append", default=[], help="leave out a pass; may be repeated")
    parser.add_argument("--pass", metavar="FILE.py[@PASS]", dest="own", action="append", default=[],
                        help="run your own pass, after PASS or before the cache becomes static; may be repeated")  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="leave out the proof: both graphs against what they are made "
                        "of, on small inputs")  # fmt: skip
    parser.add_argument("--verify", "--verify-all", dest="verify", action="store_true", help="also run the graph before and "
                        "after each pass, and prove all layers of a large one; stop at a difference")  # fmt: skip
    parser.add_argument("--bisect", action="store_true", help="as --verify, and find the first match that differs")
    parser.add_argument(
        "--past", metavar="REGEX", type=arguments.pattern, help="which inputs are caches, where their names do not say so"
    )
    parser.add_argument("--name", metavar="ROLE=NAME", type=arguments.pair, dest="named", action="append", default=[],
                        help="what an input or output is for (tokens, logits, ...), likewise; may be repeated")  # fmt: skip
    parser.add_argument("--branch", choices=("then", "else", "past"), help="of a graph that is one If (decoder_model_merged), "
                        "the branch to take out; past: the one that reads a cache")  # fmt: skip
    quantising.add_options(parser)


def add_cutting(parser: arguments.Container) -> None:
    """What makes a graph of several, of which the pipeline runs none: surgery's own command has it."""
    parser.add_argument("--once", metavar="INPUT", nargs="+", action="append", default=[],
                        help="what depends on these inputs alone, which change rarely, becomes a graph of its own, once.onnx, whose "
                        "results model.onnx takes; may be repeated for inputs that change at other times")  # fmt: skip


def refuse_without_effect(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where two options do not go together, or one does nothing beside the others."""
    if options.cache == "growing" and given(options, "capacity"):
        parser.error("--capacity is a static cache's; leave it out with --cache growing")
    if options.cache == "growing" and options.attention == "lengths":
        parser.error("--attention lengths is a static cache's; leave it out with --cache growing")
    if options.no_verify and (options.verify or options.bisect):
        parser.error("--no-verify leaves out what --verify-all and --bisect ask for; choose one")
    roles = [each.partition("=")[0] for each in options.named]
    if twice := {role for role in roles if roles.count(role) > 1}:
        parser.error(f"--name gives {', '.join(sorted(twice))} twice")
    quantising.refuse_without_effect(parser, options)

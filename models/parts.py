"""A model's parts: the graphs that it is written as, in the order in which they are called.

Most models are one decoder. A family whose models are more has a method `parts()` on its module that returns them, as
suture.models.whisper: what each takes and gives, and which of its inputs are outputs of the parts before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from suture.core.errors import UserError
from suture.core.parts import DECODER, GRAPH


@dataclass(frozen=True)
class Port:
    """An input or output of a part of kind GRAPH."""

    shape: tuple[int | str, ...]  # a name where an axis may have any length
    below: int | None = None  # int64 from 0 to less than this; None: floats of the type that the model computes in


@dataclass(frozen=True)
class Part:
    """One graph. Of kind DECODER: a step with a KV cache, `module` as suture.models.qwen.Qwen, whose `dimensions` say what it
    takes and gives. Of kind GRAPH: `module` takes the inputs in their order and returns the outputs in theirs, one as a
    tensor, several as a list."""

    name: str
    kind: str  # DECODER or GRAPH
    module: nn.Module
    inputs: Mapping[str, Port] = field(default_factory=dict)  # of kind GRAPH, by name
    outputs: Mapping[str, Port] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)  # input -> "part/output", of a part before this one


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The model's parts in the order in which they are called."""
    own = getattr(model, "parts", None)
    return own() if own else (Part("decoder", DECODER, model),)


def part_named(model: nn.Module, name: str) -> Part:
    """Raises UserError naming the parts that there are."""
    parts = {part.name: part for part in parts_of(model)}
    if name not in parts:
        raise UserError(f"--part {name}", "no such part", f"choose from {', '.join(parts)}")
    return parts[name]


__all__ = ["DECODER", "GRAPH", "Part", "Port", "part_named", "parts_of"]

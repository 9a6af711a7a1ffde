"""A model's parts: the graphs that it is written as, in the order in which they are called.

Most models are one decoder. A family whose models are more has a method `parts()` on its module that returns them, as
suture.models.families.whisper: what each takes and gives, and which of its inputs are outputs of the parts before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from suture.core.errors import UserError
from suture.core.parts import DECODER, GRAPH
from suture.core.signature import EMBEDDINGS, TOKENS


@dataclass(frozen=True)
class Port:
    """An input or output of a part of kind GRAPH."""

    shape: tuple[int | str, ...]  # a name where an axis may have any length
    below: int | None = None  # int64 from 0 to less than this; None: floats of the type that the model computes in
    exact: bool = False  # floats that are float32 whatever that type is, as places are


@dataclass(frozen=True)
class Part:
    """One graph. Of kind DECODER: a step with a KV cache, `module` as suture.models.families.qwen.Qwen, whose `dimensions` say what it
    takes and gives. Of kind GRAPH: `module` takes the inputs in their order and returns the outputs in theirs, one as a
    tensor, several as a list."""

    name: str
    kind: str  # DECODER or GRAPH
    module: nn.Module
    inputs: Mapping[str, Port] = field(default_factory=dict)  # of kind GRAPH, by name
    outputs: Mapping[str, Port] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)  # input -> "part/output", of a part before this one
    multiples: Mapping[str, int] = field(default_factory=dict)  # by axis, of what its length is a multiple, where not of 1
    wants_float32: bool = False  # its own config.json says that its numbers pass what float16 holds
    takes_embeddings: bool = False  # a decoder: in place of token ids, which become embeddings in a part before it


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The model's parts in the order in which they are called."""
    own = getattr(model, "parts", None)
    parts = own() if own else (Part("decoder", DECODER, model),)
    return tuple(each for part in parts for each in (_apart(part) if part.takes_embeddings else (part,)))


def part_named(model: nn.Module, name: str) -> Part:
    """Raises UserError naming the parts that there are."""
    parts = {part.name: part for part in parts_of(model)}
    if name not in parts:
        raise UserError(f"--part {name}", "no such part", f"choose from {', '.join(parts)}")
    return parts[name]


class Embed(nn.Module):
    """A decoder's table of embeddings, under the name that it has there."""

    def __init__(self, path: str, table: nn.Embedding):
        super().__init__()
        self.path, inner = path, self
        *above, name = path.split(".")
        for each in above:
            inner.add_module(each, nn.Module())
            inner = inner.get_submodule(each)
        inner.add_module(name, table)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B,S] to [B,S,hidden]."""
        return self.get_submodule(self.path)(input_ids)


def table_of(decoder: nn.Module) -> tuple[str, nn.Embedding]:
    """The table of embeddings of a decoder's tokens, and its module's path."""
    vocab = decoder.dimensions.vocab
    tables = [(path, module) for path, module in decoder.named_modules() if isinstance(module, nn.Embedding)]
    (found,) = [(path, table) for path, table in tables if table.num_embeddings == vocab]
    return found


def _apart(decoder: Part) -> tuple[Part, Part]:
    """The table as a part of its own, and the decoder that takes what it gives."""
    path, table = table_of(decoder.module)
    tokens = {TOKENS: Port(("batch", "sequence"), below=table.num_embeddings)}
    embeddings = {EMBEDDINGS: Port(("batch", "sequence", table.embedding_dim))}
    embed = Part("embed", GRAPH, Embed(path, table).eval(), tokens, embeddings)
    return embed, replace(decoder, reads={**decoder.reads, EMBEDDINGS: f"{embed.name}/{EMBEDDINGS}"})


__all__ = ["DECODER", "GRAPH", "Part", "Port", "part_named", "parts_of", "table_of"]

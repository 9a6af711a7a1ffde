"""An engine as a decoder that keeps its caches on the GPU."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from suture.core.signature import Cache, Signature
from suture.core.step_inputs import Embed
from suture.runtime.decoders import OfSignature, StaticDecoder, made_up_constants
from suture.runtime.engine import Engine, EngineSession, read_description
from suture.runtime.seen import placed_by


@dataclass(frozen=True)
class EngineModel(OfSignature):
    """An engine as a suture.validate.runners.SteppedModel."""

    engine: Engine = field(repr=False)
    embed: Embed | None = field(repr=False, default=None)  # the model's own, where it takes embeddings

    @property
    def device(self) -> str:
        return self.engine.device

    @property
    def vocab(self) -> int:
        (logits,) = (tensor for tensor in self.engine.description["outputs"] if tensor["role"] == "logits")
        return logits["shape"][-1]

    @property
    def largest_step(self) -> tuple[int, int]:
        """The most sequences, and the most tokens of one sequence, that a profile allows."""
        tokens = self.signature.tokens
        shapes = [
            profile["shapes"][tokens][2] for profile in self.engine.description["profiles"] if tokens in profile["shapes"]
        ]
        shapes = shapes or [next(tensor["shape"] for tensor in self.engine.description["inputs"] if tensor["name"] == tokens)]
        return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)

    def decoder(self, batch: int, noise: bool = True) -> StaticDecoder:
        """With `noise`, as suture.runtime.graphs.OnnxDecoder.decoder."""
        session = EngineSession(self.engine, batch)
        placed = placed_by(self.embed, self.signature.position_rows, batch)
        made = StaticDecoder(session, self.signature, noise, self.embed, placed)
        if noise:
            shapes = [tuple(session.crossed[cache.past].shape[1:]) for cache in self.signature.encoder_caches]
            made.cross(made_up_constants(self.signature, shapes, batch, np.float32))
        return made


def open_engine(path: Path, name: str = "engine") -> EngineModel:
    """Deserialises build/model.engine, described by the engine.json beside it, on the GPU."""
    description = read_description(path.with_name("engine.json"))
    root = path.parent / description["weights"]["root"]
    return EngineModel(name, signature_of(description), Engine(path, description, root))


def signature_of(description: dict) -> Signature:
    """The signature that engine.json holds."""
    fields = dict(description["signature"])
    for name in ("caches", "encoder_caches"):
        fields[name] = tuple(Cache(**cache) for cache in fields.get(name, ()))
    for name in ("prefix", "layout"):
        fields[name] = tuple(fields.get(name, ()))
    return Signature(**fields)

"""An engine as a decoder that validate.compare steps through its scenarios: level 4."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import TensorProto

from contracts.signature import Cache, Signature
from validate.decoders import OfSignature, StaticDecoder
from validate.engine import Engine, Session, read_description, to_numpy


@dataclass(frozen=True)
class EngineModel(OfSignature):
    """An engine as a validate.runners.Model."""

    name: str
    signature: Signature
    engine: Engine = field(repr=False)

    @property
    def vocab(self) -> int:
        (logits,) = (tensor for tensor in self.engine.description["outputs"] if tensor["role"] == "logits")
        return logits["shape"][-1]

    def decoder(self, batch: int) -> "EngineDecoder":
        return EngineDecoder(Session(self.engine, batch), self.signature)


class EngineDecoder(StaticDecoder):
    """A StaticDecoder whose caches lie on the GPU."""

    def __init__(self, session: Session, signature: Signature):
        shapes = [tuple(session.caches[cache.past].shape) for cache in signature.caches]
        dtype = np.float16 if signature.dtype == TensorProto.FLOAT16 else np.float32
        super().__init__(lambda feeds, buffers: session.run(feeds), signature, shapes, dtype)
        self.session = session
        session.fill({cache.past: noise for cache, noise in zip(signature.caches, self.buffers)})
        self.buffers = []

    def caches(self) -> list[np.ndarray]:
        return [to_numpy(self.session.caches[cache.past]) for cache in self.signature.caches]


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
    return Signature(**fields)

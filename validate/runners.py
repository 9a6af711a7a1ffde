"""Decoders as Polygraphy runners: one step is one inference, one scenario one activation."""

import time
from collections import OrderedDict
from typing import Protocol

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from suture.core.signature import LOGITS, present_name
from suture.core.tolerances import marked
from suture.runtime.decoders import Decoder


class SteppedModel(Protocol):
    """What can be stepped: suture.runtime.graphs.OnnxDecoder, suture.validate.reference.TorchReference."""

    name: str
    dtype: int  # onnx.TensorProto type that it computes in
    vocab: int
    capacity: int | None
    trained_length: int | None
    last_only: bool
    bidirectional: bool  # a step's tokens see each other: a prompt is one step
    prefix: tuple[int, ...]  # what begins every row, before the text
    cache_names: list[tuple[int, str]]  # layer and role of each of a decoder's caches

    def decoder(self, batch: int) -> Decoder: ...


class DecoderRunner(BaseRunner):
    """Inputs: tokens int64 [B,S], counts int64 [B], alpha float32 [B], final bool [].
    Outputs: logits float32 [valid tokens, vocab], row after row; with `last`, of each row's last valid token only. At a
    scenario's final step also every cache, [valid tokens so far, kv_heads, head_dim], as valid_slots gives it.

    With `alone` every row runs as a batch of its own and without padding: what a batch must not change.
    """

    def __init__(self, model: SteppedModel, alone: bool = False, last: bool = False):
        super().__init__(name=model.name)
        self.model, self.alone, self.last = model, alone, last
        self.decoders: list[Decoder] = []

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        metadata.add("tokens", np.dtype(np.int64), (None, None))
        metadata.add("counts", np.dtype(np.int64), (None,))
        metadata.add("alpha", np.dtype(np.float32), (None,))
        metadata.add("final", np.dtype(bool), ())
        return metadata

    def infer_impl(self, feed_dict: dict) -> OrderedDict:
        tokens, counts, alpha = feed_dict["tokens"], feed_dict["counts"], feed_dict["alpha"]
        batch = len(tokens)
        parts = [slice(row, row + 1) for row in range(batch)] if self.alone else [slice(0, batch)]
        self.decoders = self.decoders or [self.model.decoder(part.stop - part.start) for part in parts]

        started = time.perf_counter()
        logits = []
        for decoder, part in zip(self.decoders, parts):
            if width := counts[part].max():
                step = decoder.step(tokens[part, :width], counts[part], alpha[part])
                logits.append(valid_logits(step, counts[part], self.last))
        self.inference_time = time.perf_counter() - started

        outputs = OrderedDict({LOGITS: np.concatenate(logits).astype(np.float32)})
        if feed_dict["final"]:
            caches = [valid_slots(decoder) for decoder in self.decoders]
            for index, place in enumerate(self.model.cache_names):
                outputs[present_name(*place)] = np.concatenate([cache[index] for cache in caches])
        return outputs

    def deactivate_impl(self) -> None:
        self.decoders = []


def valid_logits(logits: np.ndarray, counts: np.ndarray, last: bool) -> np.ndarray:
    """[valid tokens, vocab] of a step's [B,S,vocab], or [B,1,vocab] from a graph that gives the last ones only."""
    rows = np.flatnonzero(counts)
    if last:
        return logits[rows, np.minimum(counts[rows], logits.shape[1]) - 1]
    return np.concatenate([logits[row, : counts[row]] for row in rows])


def valid_slots(decoder: Decoder) -> list[np.ndarray]:
    """Each cache as [valid tokens, kv_heads, head_dim]: float32, or what `marked` makes of one that is quantised."""
    valid = []
    for cache in decoder.caches():
        slots_HND = np.concatenate([cache[row, :, :length] for row, length in enumerate(decoder.lengths)], axis=1)
        valid.append(np.ascontiguousarray(marked(slots_HND.swapaxes(0, 1))))
    return valid

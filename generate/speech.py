"""Speech to text with Whisper: an audio file, cut into the windows that the encoder takes, to text window by window.

The log-mel spectrogram is transformers' own. A window is read on its own: what was said before it is no part of its prompt.
"""

import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor
from transformers.generation.logits_process import (
    LogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.reader import open_regular, read_json
from suture.core.refusals import refusals
from suture.core.shadow_copy import runnable
from suture.core.signature import Signature, present_name
from suture.core.weights import load_graph, weights_root
from suture.generate.batch import Batch, Sequence
from suture.generate.text import TextStream
from suture.models.config import read_generation, required
from suture.runtime.graphs import fast_session
from suture.serve.request import Processor

MOST_SAMPLES = 1 << 30  # of all channels, and once they are at the model's rate: 4 GB
GENERATION, PREPROCESSOR = "generation_config.json", "preprocessor_config.json"


class EncoderSession:
    """A spectrogram to what the decoder's cross-attention reads."""

    def __init__(self, path: Path, signature: Signature, device: str):
        model = runnable(load_graph(path))
        self.session = fast_session(model, weights_root(path), str(path), device)
        (given,) = self.session.get_inputs()
        self.name, self.dtype = given.name, {"tensor(float)": np.float32, "tensor(float16)": np.float16}[given.type]
        self.bins, self.frames = given.shape[1:]
        self.outputs = {present_name(cache.layer, cache.role): cache.past for cache in signature.encoder_caches}
        if missing := sorted(set(self.outputs) - {output.name for output in self.session.get_outputs()}):
            raise UserError(path, f"has no outputs {', '.join(missing)}", "export encoder and decoder together")

    def __call__(self, features: np.ndarray) -> dict[str, np.ndarray]:
        values = self.session.run(list(self.outputs), {self.name: features.astype(self.dtype)})
        return dict(zip(self.outputs.values(), values))


class Speech:
    """A Whisper checkpoint: how its audio is prepared, and what its decoder is prompted with."""

    def __init__(self, checkpoint: Path, encoder: EncoderSession):
        self.encoder = encoder
        if os.path.lexists(checkpoint / PREPROCESSOR):
            read_json(inside(checkpoint, PREPROCESSOR))
            with refusals(checkpoint / PREPROCESSOR, "is refused by transformers", "put the checkpoint's own there"):
                self.extract = WhisperFeatureExtractor.from_pretrained(str(checkpoint), local_files_only=True)
        else:
            hop, rate = 160, 16000  # of every Whisper
            self.extract = WhisperFeatureExtractor(encoder.bins, chunk_length=encoder.frames * hop // rate)
        self.file = checkpoint / GENERATION
        self.config = read_generation(self.file)
        self.start = required(self.config, "decoder_start_token_id", self.file)
        self.tasks = required(self.config, "task_to_id", self.file) if self.config.get("lang_to_id") else {}
        if self.tasks and (missing := {"translate", "transcribe"} - self.tasks.keys()):
            raise UserError(self.file, f"its task_to_id lacks {min(missing)}", "put the checkpoint's own there")

    @property
    def tokens(self) -> set[int]:
        """The ids that a prompt can have."""
        named = [self.start, self.config.get("no_timestamps_token_id"), *self.tasks.values()]
        return {token for token in (*named, *(self.config.get("lang_to_id") or {}).values()) if token is not None}

    @property
    def processors(self) -> list[Processor]:
        """What the checkpoint never writes, or not at the beginning."""
        kept = []
        if self.config.get("suppress_tokens"):
            kept.append(SuppressTokensLogitsProcessor(self.config["suppress_tokens"]))
        if self.config.get("begin_suppress_tokens"):
            kept.append(SuppressTokensAtBeginLogitsProcessor(self.config["begin_suppress_tokens"], len(self.prompt("", False))))
        return [partial(_by_the_library, processor) for processor in kept]

    def windows(self, path: Path) -> Iterator[np.ndarray]:
        """Spectrograms [1, mel bins, frames]. Raises UserError for a file that holds no audio."""
        samples = read_audio(path, self.extract.sampling_rate)
        length = self.encoder.frames * self.extract.hop_length
        for start in range(0, len(samples), length):
            window = samples[start : start + length]
            yield self.extract(window, sampling_rate=self.extract.sampling_rate, return_tensors="np")["input_features"]

    def language(self, batch: Batch, wanted: str | None) -> str:
        """The token of the language that is wanted, or that the decoder hears in the window it attends to."""
        known = self.config.get("lang_to_id") or {}
        if not known:
            if wanted is not None:
                raise UserError("--language", "this checkpoint knows one language only", "leave it out")
            return ""
        if wanted is not None:
            if f"<|{wanted}|>" not in known:
                codes = ", ".join(sorted(code.strip("<|>") for code in known))
                raise UserError("--language", f"{wanted} is not known", f"give one of {codes}")
            return f"<|{wanted}|>"
        logits = batch.peek([self.start])
        return max(known, key=lambda token: logits[known[token]])

    def prompt(self, language: str, translate: bool) -> list[int]:
        """Token ids: start of transcript, language and task where the checkpoint has several, no timestamps."""
        config, ids = self.config, [self.start]
        if known := config.get("lang_to_id"):
            ids += [known.get(language, -1), self.tasks["translate" if translate else "transcribe"]]
        elif translate:
            raise UserError("--translate", "this checkpoint only transcribes", "leave it out")
        return ids + [token for token in [config.get("no_timestamps_token_id")] if token is not None]

    def listen(
        self,
        path: Path,
        batch: Batch,
        stream: Callable[[], TextStream],
        limit: int,
        stop_ids: frozenset[int],
        language: str | None,
        translate: bool,
    ) -> Iterator[Sequence]:
        """What has to be written, window after window, while `batch` attends to that window."""
        for index, features in enumerate(self.windows(path)):
            started = time.perf_counter()
            batch.cross(self.encoder(features))
            prompt = self.prompt(self.language(batch, language), translate)
            yield Sequence(index, prompt, limit, stop_ids, stream(), time.perf_counter() - started)


def _by_the_library(processor: LogitsProcessor, scores_V: torch.Tensor, prompt: Many[int], answer: Many[int]) -> torch.Tensor:
    seen = torch.tensor([[*prompt, *answer]], device=scores_V.device)
    return processor(seen, scores_V[None])[0]


def read_audio(path: Path, rate: int) -> np.ndarray:
    """float32 samples of the file at `rate`, its channels mixed into one."""
    import soundfile
    import soxr

    with open_regular(path, "name a WAV file") as file:
        try:
            audio = soundfile.SoundFile(file)
            found, size = audio.samplerate, audio.frames * max(audio.channels, rate / max(audio.samplerate, 1))
            samples = audio.read(dtype="float32", always_2d=True) if size <= MOST_SAMPLES else None
        except (soundfile.SoundFileError, OSError, ValueError, TypeError):
            raise UserError(path, "holds no audio that can be read", "name a WAV file") from None
    if samples is None:
        raise UserError(path, f"has more than {MOST_SAMPLES:,} samples", "cut it into several files")
    if not len(samples):
        raise UserError(path, "is empty", "name a file with sound in it")
    return soxr.resample(samples.mean(axis=1), found, rate)

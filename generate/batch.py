"""Sequences through the scheduler (suture.serve.engine), as rows of its batch become free."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from suture.generate.text import TextStream
from suture.runtime.engine_decoder import EngineModel
from suture.runtime.graphs import OnnxDecoder
from suture.serve.engine import Scheduler
from suture.serve.request import CAPACITY, LENGTH, STOP, GenerationRequest, Processor, Sampling, Token
from suture.serve.speed import Speed

__all__ = ["CAPACITY", "LENGTH", "STOP", "Batch", "Sequence"]


@dataclass
class Sequence:
    """A prompt and its answer."""

    index: int  # among the run's, which decides its randomness
    prompt: list[int]
    limit: int  # tokens of the answer
    stop_ids: frozenset[int]
    text: TextStream
    prepared: float = 0.0  # seconds that it took to have something to answer: of an encoder
    answer: list[int] = field(default_factory=list)
    finish: str | None = None

    def take(self, token: int) -> str:
        """Adds a token to the answer, and returns the text that can be shown."""
        self.answer.append(token)
        shown = "" if token in self.stop_ids else self.text.add(token)
        if token in self.stop_ids or self.text.stopped:
            self.finish = STOP
        elif len(self.answer) == self.limit:
            self.finish = LENGTH
        return shown


class Batch:
    """`rows` of a decoder, empty at first. `vocab`: ids from there on are no tokens; `processors` are a model's own. What the rows'
    caches hold stays there for prompts that begin with the same tokens, as the next turn of a conversation does."""

    def __init__(
        self,
        model: OnnxDecoder | EngineModel,
        rows: int,
        sampling: Sampling,
        vocab: int,
        chunk: int,
        speed: Speed,
        processors: Many[Processor] = (),
    ):
        self.scheduler = Scheduler(model, rows, chunk, vocab, speed)
        self.sampling, self.speed, self.processors = sampling, speed, processors

    def run(self, waiting: Iterator[Sequence], show: Callable[[Sequence, str], None]) -> Iterator[Sequence]:
        """Runs all sequences, each asked for when there is a row for it, and yields each as it ends. `show` is given text as it
        comes."""
        done: deque[Sequence] = deque()
        while True:
            if self.scheduler.free and (sequence := next(waiting, None)) is not None:
                self.scheduler.submit(self._request(sequence, show, done))
            if not self.scheduler.busy:
                return
            self.scheduler.tick()
            while done:
                yield done.popleft()

    def cross(self, values: dict[str, np.ndarray]) -> None:
        """What cross-attention reads from now on; what the rows' caches hold was computed with something else."""
        self.scheduler.decoder.cross(values)
        self.scheduler.rows.forget()

    def peek(self, prompt: list[int]) -> torch.Tensor:
        """The logits [vocab] after a prompt, which leaves no trace. For a batch of one row."""
        decoder = self.scheduler.decoder
        logits = decoder.advance(np.array([prompt], np.int64), np.array([len(prompt)]), np.ones(1, np.float32))
        self.scheduler.rows.forget()
        return logits[0, -1].float().cpu()

    def _request(self, sequence: Sequence, show: Callable[[Sequence, str], None], done: deque[Sequence]) -> GenerationRequest:
        started = time.perf_counter()

        def take(token: Token) -> bool:
            if not sequence.answer:
                self.speed.first.append(sequence.prepared + time.perf_counter() - started)
                self.speed.prompt_seconds += sequence.prepared
            show(sequence, sequence.take(token.id))
            return sequence.finish is not None

        def ended(why: str) -> None:
            if request.fault is not None:
                raise request.fault
            sequence.finish = sequence.finish or why
            show(sequence, sequence.text.end())
            done.append(sequence)

        sampling = replace(self.sampling, seed=(self.sampling.seed, sequence.index))
        request = GenerationRequest(sequence.prompt, sequence.limit, take, ended, sampling, self.processors)
        return request

"""One decode loop for all runtimes: rows of a batch that sequences take in turn.

A prompt is read alone, into its own row of the cache; decoding steps all rows at once. A row that ends is given to the
next sequence while the others go on.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from suture.core.signature import ntk_alpha
from suture.generate.sampling import Sampler
from suture.generate.speed import Speed
from suture.generate.text import TextStream
from suture.runtime.decoders import RowDecoder
from suture.runtime.engine_decoder import EngineModel
from suture.runtime.graphs import OnnxDecoder

STOP, LENGTH, CAPACITY = "stop", "length", "capacity"  # why an answer ended


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
    """`rows` of a decoder, empty at first.

    What a row's cache holds stays there until another prompt overwrites it: a prompt that begins with the same tokens,
    as the next turn of a conversation does, has only the rest fed. Under dynamic NTK the original Qwen chooses alpha from
    the length of the whole conversation at each turn (its chat() reads all of it again) and keeps it while decoding. So
    the cache is reused as long as that alpha is the one it was computed with; at another one it is computed anew.

    Where a prompt sees itself in both directions, it is read as a whole, in one step: nothing of it can be reused.
    """

    def __init__(self, model: OnnxDecoder | EngineModel, rows: int, sampler: Sampler, chunk: int, speed: Speed):
        self.model, self.sampler, self.chunk, self.speed = model, sampler, chunk, speed
        self.decoder: RowDecoder = model.decoder(rows, noise=False)
        self.sequences: list[Sequence | None] = [None] * rows
        self.draws: list[torch.Generator | None] = [None] * rows
        self.held: list[list[int]] = [[] for _ in range(rows)]  # the tokens that each row's cache holds
        self.alpha = np.ones(rows, np.float32)

    def run(self, waiting: Iterator[Sequence], show: Callable[[Sequence, str], None]) -> Iterator[Sequence]:
        """Runs all sequences, and yields each as it ends. `show` is given text as it comes."""
        while True:
            for row, sequence in enumerate(self.sequences):
                while sequence is None and (sequence := next(waiting, None)) is not None:
                    self._begin(row, sequence, show)
                    if sequence.finish:  # with its first token
                        yield self._end(row, show)
                        sequence = None
            if not any(self.sequences):
                return
            self._decode(show)
            for row, sequence in enumerate(self.sequences):
                if sequence is not None and sequence.finish:
                    yield self._end(row, show)

    def cross(self, values: dict[str, np.ndarray]) -> None:
        """What cross-attention reads from now on; what the rows' caches hold was computed with something else."""
        self.decoder.cross(values)
        for row in range(len(self.held)):
            self._forget(row)

    def peek(self, prompt: list[int]) -> torch.Tensor:
        """The logits [vocab] after a prompt, which leaves no trace. For a batch of one row."""
        tokens = np.array([prompt], np.int64)
        logits = self.decoder.advance(tokens, np.array([len(prompt)]), self.alpha)[0, -1].float().cpu()
        self._forget(0)
        return logits

    def _begin(self, row: int, sequence: Sequence, show: Callable[[Sequence, str], None]) -> None:
        """Reads the prompt, but for what the row's cache holds of it, and chooses the first token."""
        started = time.perf_counter()
        prompt, trained = [*self.model.prefix, *sequence.prompt], self.model.trained_length
        alpha = ntk_alpha(len(prompt), trained) if trained else 1.0
        whole = self.model.bidirectional
        reused = _common(self.held[row], prompt[:-1]) if alpha == self.alpha[row] and not whole else 0
        self.alpha[row] = alpha
        self.decoder.keep(row, reused)
        place = slice(row, row + 1)
        chunk = len(prompt) if whole else self.chunk
        for start in range(reused, len(prompt), chunk):
            tokens = np.array([prompt[start : start + chunk]], np.int64)
            logits = self.decoder.advance(tokens, np.array([tokens.shape[1]]), self.alpha[place], place)
        self.held[row] = prompt
        self.sequences[row], self.draws[row] = sequence, self.sampler.draws(sequence.index, logits.device)
        self._choose(logits[:, -1], [row], show)
        seconds = sequence.prepared + time.perf_counter() - started
        self.speed.first.append(seconds)
        self.speed.read += len(prompt) - reused
        self.speed.reused += reused
        self.speed.prompt_seconds += seconds

    def _decode(self, show: Callable[[Sequence, str], None]) -> None:
        """One more token for every row that has a sequence."""
        started = time.perf_counter()
        active = [row for row, sequence in enumerate(self.sequences) if sequence is not None]
        tokens = np.zeros((len(self.sequences), 1), np.int64)
        counts = np.zeros(len(self.sequences), np.int64)
        for row in active:
            tokens[row], counts[row] = self.sequences[row].answer[-1], 1
            self.held[row].append(self.sequences[row].answer[-1])
        logits = self.decoder.advance(tokens, counts, self.alpha)
        self._choose(logits[active, -1], active, show)
        self.speed.decode_seconds += time.perf_counter() - started
        self.speed.steps += 1
        self.speed.decoded += len(active)
        valid = sum(len(self.held[row]) for row in active)
        caches = valid * self.decoder.slot_bytes + len(active) * self.decoder.encoder_bytes
        self.speed.decode_bytes += self.speed.weight_bytes + caches

    def _choose(self, logits_BV: torch.Tensor, rows: list[int], show: Callable[[Sequence, str], None]) -> None:
        sequences = [self.sequences[row] for row in rows]
        seen = [[*each.prompt, *each.answer] for each in sequences] if self.sampler.looks_back else []
        chosen = self.sampler.choose(logits_BV, seen, [self.draws[row] for row in rows])
        for row, sequence, token in zip(rows, sequences, chosen):
            show(sequence, sequence.take(token))
            if not sequence.finish and len(self.held[row]) == self.model.longest:
                sequence.finish = CAPACITY
        self.speed.written += len(rows)

    def _end(self, row: int, show: Callable[[Sequence, str], None]) -> Sequence:
        sequence, self.sequences[row] = self.sequences[row], None
        show(sequence, sequence.text.end())
        if self.model.longest is not None and len(self.held[row]) == self.model.longest:
            self._forget(row)
        return sequence

    def _forget(self, row: int) -> None:
        """An idle row takes part in every step, which needs a free slot to write to."""
        self.held[row] = []
        self.decoder.keep(row, 0)


def _common(held: list[int], prompt: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, (ours, theirs) in enumerate(zip(held, prompt)) if ours != theirs), min(len(held), len(prompt))
    )

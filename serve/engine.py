"""The scheduler: many requests over the rows of one batch (continuous batching).

A tick reads at most one chunk of one row's prompt, then takes one decoding step of all rows that decode. Both are never one
step: its padding would be computed, at two to five times the cost. So no row waits longer for its next token than one chunk
takes. Requests take free rows in the order they came, and keep them until they end.

Tokens are chosen where the logits are, and a tick does not wait for them: with `lag` 1 the next step is queued while they
travel to the host, and a row that turns out to have ended has computed one token more, which is dropped. What needs the host
between two steps (a request's own processors or log-probabilities, speculation) waits for them.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from suture.runtime.decoders import OfSignature, RowDecoder
from suture.serve import lookup
from suture.serve.request import CANCELLED, CAPACITY, FAILED, LENGTH, STOP, GenerationRequest, Token
from suture.serve.rows import Rows
from suture.serve.sampling import Sampler, told
from suture.serve.speed import Speed


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass
class Chosen:
    """The tokens of a step, on their way to the host."""

    requests: list[tuple[int, GenerationRequest]]  # the place of each one's token among `ids`
    ids: torch.Tensor
    tokens: dict[int, Token]  # by place, where more than the id is wanted
    event: torch.cuda.Event | None = None

    def __post_init__(self):
        if self.ids.device.type == "cuda":
            self.ids = self.ids.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def arrived(self) -> list[tuple[GenerationRequest, Token]]:
        if self.event is not None:
            self.event.synchronize()
        ids = self.ids.tolist()
        return [(request, self.tokens.get(place) or Token(ids[place])) for place, request in self.requests]


class Scheduler:
    """`chunk`: the most tokens of a prompt that a tick reads; `queue`: the most requests that wait, or None; `guesses`: the most
    tokens that prompt lookup adds to a step; `lag`: steps that are queued ahead of tokens, None for what suits the device.

    submit() and cancel() may be called from any thread, all else from the one that ticks."""

    def __init__(
        self, model: OfSignature, rows: int, chunk: int, vocab: int, speed: Speed | None = None, queue: int | None = None,
        guesses: int = 0, lag: int | None = None,
    ):  # fmt: skip
        self.model, self.chunk, self.speed, self.queue = model, chunk, speed or Speed(), queue
        self.guesses = 0 if model.last_only or model.bidirectional else guesses
        self.decoder: RowDecoder = model.decoder(rows, noise=False)
        self.rows = Rows(model, self.decoder, rows, spare=1 + self.guesses)
        self.device = torch.device(model.device)
        self.sampler = Sampler(rows, vocab, self.device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)  # each row's last one
        self.lag = 0 if self.guesses else int(self.device.type == "cuda") if lag is None else lag
        self.pending: deque[Chosen] = deque()
        self.waiting: deque[GenerationRequest] = deque()
        self.cancelled: list[GenerationRequest] = []
        self.lock = threading.Lock()

    def submit(self, request: GenerationRequest) -> None:
        """Raises QueueFull."""
        with self.lock:
            if self.queue is not None and len(self.waiting) >= self.queue:
                raise QueueFull
            self.waiting.append(request)

    def cancel(self, request: GenerationRequest) -> None:
        """Ends the request within a tick, if it has not ended."""
        with self.lock:
            self.cancelled.append(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.cancelled or self.pending or self.rows.used)

    @property
    def free(self) -> bool:
        """Whether a request that is submitted now gets a row at the next tick."""
        return bool(self.rows.free) and self.rows.reading is None and not self.waiting

    def tick(self) -> None:
        self._drop_cancelled()
        self._admit()
        started = time.perf_counter()
        self._read()
        read = time.perf_counter()
        decoded = self._decode()
        while len(self.pending) > self.lag or (self.pending and not self._going_on()):
            self._land()
        self.speed.prompt_seconds += (read if decoded else time.perf_counter()) - started
        self.speed.decode_seconds += (time.perf_counter() - read) * decoded

    def memory(self) -> dict[str, int]:
        """Bytes that the batch takes for good, beside the weights: of a cache that grows, what its rows hold now."""
        rows = len(self.decoder.lengths)
        slots = rows * (self.model.capacity or int(self.decoder.lengths.max(initial=0)))
        return {"caches": slots * self.decoder.slot_bytes + rows * self.decoder.encoder_bytes, "slot": self.decoder.slot_bytes}

    def _drop_cancelled(self) -> None:
        with self.lock:
            cancelled, self.cancelled = [request for request in self.cancelled if not request.finish], []
            self.waiting = deque(request for request in self.waiting if request not in cancelled)
        for request in cancelled:
            if not request.finish:  # it may be there twice
                self._end(request, CANCELLED)

    def _admit(self) -> None:
        if self.rows.reading is not None or not self.rows.free:
            return
        with self.lock:
            if not self.waiting:
                return
            request = self.waiting.popleft()
        request.began = time.monotonic()
        self.sampler.begin(self.rows.admit(request), request)
        self.speed.reused += request.reused

    def _read(self) -> None:
        """One chunk of a prompt, and with its last one the answer's first token."""
        if (index := self.rows.reading) is None:
            return
        row, place = self.rows[index], slice(index, index + 1)
        done = len(row.held)
        part = row.prompt[done:] if self.model.bidirectional else row.prompt[done : done + self.chunk]
        alpha = np.full(1, row.alpha, np.float32)
        logits = self.decoder.advance(np.array([part], np.int64), np.array([len(part)]), alpha, place)
        row.held = row.prompt[: done + len(part)]
        self.speed.read += len(part)
        self.speed.chunks += 1
        if len(row.held) == len(row.prompt):
            self._choose(logits[:, -1], index, [index])

    def _decode(self) -> bool:
        """One more token, or with guesses some more, for every row that has its prompt behind it. Whether there is such a row."""
        if any(self._needs_host(index) for index in self.rows.used) or self._full():
            while self.pending:
                self._land()
        if not self._decoding():
            return False
        self._to_the_front()
        active = self._decoding()
        count = self.decoder.step_rows(max(active) + 1)
        guessed = self._guesses(active, count) if self.guesses else {}
        if any(guessed.values()):
            self._verify(active, count, guessed)
        else:
            counts = np.zeros(count, np.int64)
            counts[active] = 1
            logits = self.decoder.decode(self.tokens[:count], counts, self._alpha(count), slice(0, count))
            self._choose(logits[:, -1], 0, active)
        self.speed.steps += 1
        self.speed.rows += count
        valid = int(self.decoder.lengths[active].sum())
        caches = valid * self.decoder.slot_bytes + len(active) * self.decoder.encoder_bytes
        self.speed.decode_bytes += self.speed.weight_bytes + caches
        return True

    def _decoding(self) -> list[int]:
        longest = self.model.longest
        return [
            index for index in self.rows.used
            if 0 < self.rows[index].chosen < self.rows[index].request.limit
            and (longest is None or self.decoder.lengths[index] < longest)
        ]  # fmt: skip

    def _going_on(self) -> bool:
        return bool(self._decoding()) or self.rows.reading is not None

    def _needs_host(self, index: int) -> bool:
        request = self.rows[index].request
        return bool(request.processors) or request.sampling.logprobs is not None

    def _full(self) -> bool:
        """Whether a row has no slot left for a step to write to: it ends when its tokens arrive."""
        return self.model.longest is not None and bool((self.decoder.lengths >= self.model.longest).any())

    def _to_the_front(self) -> None:
        """Rows cost the same whether they decode or not, so those that are used move to the front where a step gets smaller."""
        while (used := self.rows.used) and self.decoder.step_rows(used[-1] + 1) > self.decoder.step_rows(len(used)):
            source, target = used[-1], self.rows.free[0]
            self.rows.swap(source, target)
            self.sampler.move(source, target)
            self.tokens[target] = self.tokens[source]

    def _alpha(self, count: int) -> np.ndarray:
        return np.array([self.rows[index].alpha for index in range(count)], np.float32)

    def _choose(self, logits_KV: torch.Tensor, first: int, active: Sequence[int]) -> None:
        """The next token of the active ones among rows first ... first+K-1."""
        rows = range(first, first + len(logits_KV))
        chosen = self.sampler.choose(logits_KV, first, [self.rows[index].chosen if index in active else None for index in rows])
        self.tokens[rows.start : rows.stop] = chosen
        requests, more = [], {}
        for index in active:
            row, place = self.rows[index], index - first
            requests.append((place, row.request))
            likeliest = row.request.sampling.logprobs
            if likeliest is not None:
                more[place] = told(logits_KV[place], int(chosen[place]), likeliest, self.sampler.vocab)
            self.speed.decoded += row.chosen > 0
            row.chosen += 1
        self.speed.written += len(requests)
        self.pending.append(Chosen(requests, chosen, more))
        if not self.lag:
            self._land()

    def _guesses(self, active: list[int], count: int) -> dict[int, list[int]]:
        """What prompt lookup guesses for the rows, where there is room for it and a token's choice depends on logits alone."""
        width, longest = 1 + self.guesses, self.model.longest
        requests = {index: self.rows[index].request for index in active}
        if longest is not None and (self.decoder.lengths[:count] + width > longest).any():
            return {}
        if any(each.sampling.looks_back or self._needs_host(index) for index, each in requests.items()):
            return {}
        return {
            index: lookup.guess([*each.prompt, *each.answer], min(self.guesses, each.limit - len(each.answer) - 1))
            for index, each in requests.items()
        }

    def _verify(self, active: list[int], count: int, guessed: dict[int, list[int]]) -> None:
        """A step of each row's last token and what was guessed to follow; what is chosen otherwise is taken back."""
        tokens, counts = np.zeros((count, 1 + self.guesses), np.int64), np.zeros(count, np.int64)
        for index in active:
            fed = [self.rows[index].request.answer[-1], *guessed[index]]
            tokens[index, : len(fed)], counts[index] = fed, len(fed)
        before = self.decoder.lengths.copy()
        logits = self.decoder.advance(tokens, counts, self._alpha(count), slice(0, count))
        columns = [
            self.sampler.choose(
                logits[:, i], 0, [self.rows[row].chosen + i if i < counts[row] else None for row in range(count)]
            )
            for i in range(int(counts.max()))
        ]
        chosen = torch.stack(columns, 1).cpu().tolist()
        for index in active:
            row, request = self.rows[index], self.rows[index].request
            ids = lookup.accepted(guessed[index], chosen[index])
            self.decoder.keep(index, int(before[index]) + len(ids))
            self.tokens[index] = ids[-1]
            row.chosen += len(ids)
            self.speed.written += len(ids)
            self.speed.decoded += len(ids)
            self.speed.guessed += len(guessed[index])
            self.speed.accepted += len(ids) - 1
            for token in ids:
                self._deliver(request, Token(token))

    def _land(self) -> None:
        for request, token in self.pending.popleft().arrived():
            self._deliver(request, token)

    def _deliver(self, request: GenerationRequest, token: Token) -> None:
        if request.finish:  # by the token before, while this one was computed
            return
        row = self.rows[self.rows.of(request)]
        if request.answer:
            row.held.append(request.answer[-1])  # which the step was fed
        request.answer.append(token.id)
        try:
            stopped = request.fault is None and request.take(token)
        except Exception as fault:
            request.fault = fault
        if request.fault is not None:
            self._end(request, FAILED)
        elif stopped:
            self._end(request, STOP)
        elif len(request.answer) == request.limit:
            self._end(request, LENGTH)
        elif len(row.held) == self.model.longest:
            self._end(request, CAPACITY)

    def _end(self, request: GenerationRequest, why: str) -> None:
        request.finish = why
        for index in self.rows.used:
            if self.rows[index].request is request:
                self.rows.release(index)
                self.sampler.end(index)
        request.ended(why)

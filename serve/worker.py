"""The scheduler in a thread of its own, and answers that a program of coroutines can wait for."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from suture.generate.text import TextStream
from suture.serve.engine import QueueFull, Scheduler
from suture.serve.request import FAILED, GenerationRequest, Token

LOADING, READY, DRAINING, BROKEN = "loading", "ready", "draining", "broken"


@dataclass(frozen=True)
class Piece:
    """What an answer has got with a token: text that can be shown, often none."""

    index: int
    text: str
    token: Token | None = None


@dataclass(frozen=True)
class Ended:
    index: int
    why: str


@dataclass
class Answer:
    """One of the answers to a call, which share a queue of events."""

    index: int
    request: GenerationRequest
    asked: float  # time.monotonic()
    tokens: int = 0
    first: float | None = None


class Unavailable(Exception):
    """The server takes no requests now: it says why."""


class Worker:
    """Ticks while there is anything to do. `load` makes the scheduler, in the thread; `changed` is called with each state."""

    def __init__(self, load: Callable[[], Scheduler], changed: Callable[[str], None] = lambda state: None):
        self.load, self.changed = load, changed
        self.scheduler: Scheduler | None = None
        self.fault: BaseException | None = None
        self.state = LOADING
        self.wake, self.loaded = threading.Event(), threading.Event()
        self.stopping = False
        self.alive: set[GenerationRequest] = set()  # submitted and not ended; to be touched with `lock`
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def wait_until_loaded(self) -> None:
        """Raises what loading raised."""
        self.loaded.wait()
        if self.fault is not None:
            raise self.fault

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """All or none of them. Raises Unavailable and QueueFull."""
        with self.lock:
            if self.state != READY:
                raise Unavailable(self.state)
            queue = self.scheduler.queue
            if queue is not None and len(self.scheduler.waiting) + len(requests) > queue:
                raise QueueFull
            for request in requests:
                self.scheduler.submit(request)
                self.alive.add(request)
        self.wake.set()

    def cancel(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            if not request.finish and self.scheduler is not None:
                self.scheduler.cancel(request)
        self.wake.set()

    def ended(self, request: GenerationRequest) -> None:
        with self.lock:
            self.alive.discard(request)

    def drain(self) -> None:
        """Takes no more requests; what is asked already is answered."""
        with self.lock:
            if self.state in (LOADING, READY):
                self._become(DRAINING)
        self.wake.set()

    @property
    def idle(self) -> bool:
        with self.lock:
            return not self.alive

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()
        self.thread.join(timeout=30)

    def _become(self, state: str) -> None:
        self.state = state
        self.changed(state)

    def _run(self) -> None:
        try:
            self.scheduler = self.load()
            with self.lock:
                if self.state == LOADING:
                    self._become(READY)
            self.loaded.set()
            while not self.stopping:
                if self.scheduler.busy:
                    self.scheduler.tick()
                else:
                    self.wake.wait()
                    self.wake.clear()
        except BaseException as fault:  # nothing can be answered any more
            self.fault = fault
            with self.lock:
                left, self.alive = self.alive, set()
                self._become(BROKEN)
            self.loaded.set()
            for request in left:
                if not request.finish:
                    request.finish = FAILED
                    request.ended(FAILED)


@dataclass
class Answers:
    """The answers to one call. Events come in the order in which they happen, those of several answers mixed."""

    worker: Worker
    answers: list[Answer] = field(default_factory=list)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)

    def add(self, prompt: Sequence[int], text: TextStream, ends: frozenset[int], limit: int, **options) -> None:
        """Options as of GenerationRequest."""
        index, loop = len(self.answers), asyncio.get_running_loop()

        def tell(event: Piece | Ended) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        def take(token: Token) -> bool:
            answer.tokens += 1
            answer.first = answer.first or time.monotonic()
            shown = "" if token.id in ends else text.add(token.id)
            tell(Piece(index, shown, token))
            return token.id in ends or text.stopped

        def ended(why: str) -> None:
            self.worker.ended(request)
            try:
                rest = text.end()
            except Exception as fault:  # of the tokenizer
                request.fault, rest, why = request.fault or fault, "", FAILED
            if rest:
                tell(Piece(index, rest))
            tell(Ended(index, why))

        request = GenerationRequest(prompt, limit, take, ended, **options)
        answer = Answer(index, request, time.monotonic())
        self.answers.append(answer)

    @property
    def requests(self) -> list[GenerationRequest]:
        return [answer.request for answer in self.answers]

    def cancel(self) -> None:
        self.worker.cancel(self.requests)

    def faults(self) -> Iterator[Exception]:
        yield from (request.fault for request in self.requests if request.fault is not None)

    @property
    def usage(self) -> dict:
        prompt = sum(len(answer.request.prompt) for answer in self.answers)
        written = sum(answer.tokens for answer in self.answers)
        cached = sum(answer.request.reused for answer in self.answers)
        return {
            "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

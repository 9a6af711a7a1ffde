"""A server of a small decoder on loopback, in this process, and a tokenizer of letters for it."""

import asyncio
import io
import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from decoder_graphs import CAPACITY, VOCAB, decoder
from scheduled import MODELS, Asked, alone
from starlette.applications import Starlette

from suture.serve.app import Application, Limits, ServedModel
from suture.serve.engine import Scheduler
from suture.serve.grammar import MakeGrammar
from suture.serve.listening import Server, listen
from suture.serve.worker import READY, Worker

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?-()#\n"
assert len(LETTERS) == VOCAB


class Lettered:
    """A letter a token; the last one ends answers to a chat."""

    size = VOCAB

    def stop_ids(self, chat: bool) -> set[int]:
        return {VOCAB - 1} if chat else set()

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text if letter in LETTERS]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in ids)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[-1]["role"] != "user":
            raise ValueError("the user has to be last")
        return self.encode("".join(f"{each['role']}: {each['content']}\n" for each in messages))


def greedy(prompt: str, limit: int) -> str:
    """The text that follows a prompt, of so many tokens."""
    return Lettered().decode(alone(MODELS["static"], Asked(tuple(Lettered().encode(prompt)), limit))[0])


@dataclass
class Served:
    url: str
    application: Application
    worker: Worker
    log: io.StringIO = field(default_factory=io.StringIO)

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask(path)

    def ask(self, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """`body`: bytes, or what becomes JSON."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@contextmanager
def served(
    rows: int = 2, limits: Limits | None = None, api_key: str | None = None, queue: int | None = None, grammar: MakeGrammar | None = None,
    tokenizer=None, pace: float = 0.0, more: Sequence = (),
) -> Iterator[Served]:  # fmt: skip
    """`pace`: seconds that each tick takes longer; `more`: routes."""
    model = ServedModel(tokenizer or Lettered(), CAPACITY, 0, VOCAB, VOCAB, grammar)

    class Paced(Scheduler):
        def tick(self) -> None:
            time.sleep(pace)
            super().tick()

    worker = Worker(lambda: Paced(decoder(static=True), rows, 16, VOCAB, queue=queue))
    log = io.StringIO()
    application = Application("small", worker, lambda: model, limits or Limits(), api_key, log)
    routed: Starlette = application.starlette
    routed.router.routes.extend(more)
    socket = listen("127.0.0.1", 0)
    server = Server(routed, worker, drain_seconds=30)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[socket])), daemon=True)
    worker.start()
    thread.start()
    wait(lambda: server.started and worker.state == READY)
    yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", application, worker, log)
    server.should_exit = True
    thread.join(timeout=30)
    worker.stop()


def wait(holds, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)

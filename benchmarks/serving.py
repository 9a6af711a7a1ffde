"""What `suture serve` gives many users: tokens a second, time to the first token, time between tokens.

    python -m benchmarks.serving OUT --side-by-side 1 16 64 --length 512 --answer 128          # one server
    python -m benchmarks.serving OUT --servers 2 --side-by-side 16                             # a replica on each of two GPUs

A server of its own for each number of requests side by side, with as many rows; clients send random tokens to the servers in
turn, each the next request as soon as its last one is answered, and read streams. Before anything is timed, each server answers
one request alone; whether every answer is as long as was asked for is checked, not what it says.
"""

import http.client
import itertools
import json
import re
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.tensor_parallel import gpu_of
from suture.core import child
from suture.core.command import DONE, FOUND_DIFFERENCE, CommandParser, run

SEED, MODEL = 0, "served"
START = 300  # seconds that a server has to load
ANSWER = 600


@dataclass(frozen=True)
class RequestTimes:
    """Of one request: seconds on the clock, and the tokens that the server counted."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def between(self) -> float:
        return (self.last - self.first) / max(self.tokens - 1, 1)


class Served:
    """A server in a process of its own, on the GPU of its number where there are any."""

    def __init__(self, out: Path, index: int, rows: int, options: list[str]):
        line = child.command("suture.serve", str(out), "--port", "0", "--name", MODEL, "--rows", str(rows), "--queue", "4096",
                             "--queue-seconds", "3600", *options)  # fmt: skip
        environment = {**child.environment(), "CUDA_VISIBLE_DEVICES": gpu_of(index)}
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
        self.port, self.said = 0, []
        self.ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self.ready.wait(START) or not self.port:
            self.process.kill()
            raise RuntimeError("the server did not start: " + "".join(self.said[-5:]))

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://[^:]+:(\d+)", line):
                self.port = int(found[1])
            if "GB of weights" in line:  # what it says once the model is loaded
                self.ready.set()
        self.ready.set()

    def complete(self, prompt: list[int], answer: int) -> RequestTimes:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER)
        sent = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode())
        first = last = 0.0
        events = []
        for line in response:
            if line.startswith(b"data: {"):
                last = time.perf_counter() if not line.startswith(b'data: {"usage') else last
                first = first or last
                events.append(line)
        connection.close()
        usage = next(found for line in reversed(events) if (found := json.loads(line[6:]).get("usage")))
        return RequestTimes(sent, first, last, usage["completion_tokens"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def _started(out: Path, count: int, rows: int, options: list[str]) -> list[Served]:
    with ThreadPoolExecutor(count) as starting:
        return list(starting.map(lambda index: Served(out, index, rows, options), range(count)))


def measured(servers: list[Served], side_by_side: int, requests: int, length: int, answer: int, vocab: int) -> dict:
    random = np.random.default_rng(SEED)
    prompts = random.integers(0, vocab, (requests + len(servers), length)).tolist()
    alone, *_ = [server.complete(prompts.pop(), answer) for server in servers]
    turns = itertools.cycle(servers)
    lock = threading.Lock()

    def one(prompt: list[int]) -> RequestTimes:
        with lock:
            server = next(turns)
        return server.complete(prompt, answer)

    started = time.perf_counter()
    with ThreadPoolExecutor(side_by_side * len(servers)) as clients:
        answers = list(clients.map(one, prompts))
    seconds = time.perf_counter() - started
    return {
        "servers": len(servers), "side_by_side": side_by_side, "requests": requests, "length": length, "answer": answer,
        "seconds": seconds, "tokens_per_s": sum(each.tokens for each in answers) / seconds,
        "first_token_alone_ms": 1e3 * (alone.first - alone.sent), "between_tokens_alone_ms": 1e3 * alone.between,
        "first_token_ms": 1e3 * statistics.median(each.first - each.sent for each in answers),
        "between_tokens_ms": 1e3 * statistics.median(each.between for each in answers),
        "whole": all(each.tokens == answer for each in answers),
    }  # fmt: skip


def main(line: list[str] | None = None) -> int:
    parser = CommandParser(prog="benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="OUT", type=Path, help="a pipeline's folder, or one of its graphs")
    parser.add_argument("--servers", metavar="N", type=int, default=1, help="replicas, on a GPU each (default: %(default)s)")
    parser.add_argument("--side-by-side", metavar="N", type=int, nargs="+", default=[16], help="requests on each server")
    parser.add_argument("--requests", metavar="N", type=int, help="in all (default: four times those side by side)")
    parser.add_argument("--length", metavar="N", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--answer", metavar="N", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--vocab", metavar="N", type=int, default=1000, help="prompts are of the first N tokens")
    parser.add_argument(
        "--serve", metavar="OPTION", nargs="*", default=[], help="further options of serve, such as =--chunk=512"
    )
    parser.add_argument("--out", metavar="FILE.json", type=Path)
    given = parser.parse_args(line)
    results = []
    for side_by_side in given.side_by_side:
        servers = _started(given.model, given.servers, side_by_side, [option.removeprefix("=") for option in given.serve])
        requests = given.requests or 4 * side_by_side * given.servers
        try:
            results.append(measured(servers, side_by_side, requests, given.length, given.answer, given.vocab))
        finally:
            for server in servers:
                server.stop()
        print(json.dumps(results[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return DONE if all(result["whole"] for result in results) else FOUND_DIFFERENCE


if __name__ == "__main__":
    run("benchmarks.serving", main)

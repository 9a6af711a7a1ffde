"""Whether steps on a GPU give what transformers gives for the same weights, in every order that text is made in.

    python -m benchmarks.gpu_steps --preset qwen-7b --work DIR      # makes checkpoint, export and surgery in DIR

A step alone proves little: what a session, its bound memory and its captured CUDA graph keep of one step may be wrong in the
next. So rows of a batch go through prompts of equal and of other widths, chunks, decoding of all rows and of some, rows
begun anew, over a cache that begins full of noise; once with a session of its own for decoding, whose steps are captured on
a GPU, and once without. Then generate's own loop answers prompts that take the rows in turn.

After each step a row's logits may be at most twice as far from float32's as transformers' own in the checkpoint's type, and
its likeliest tokens must be float32's, or tie with them. Only then are the loop's speeds printed. Ends with 1 where something
differs.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from torch import Tensor

from benchmarks.gpu_decode import ROUNDING, TOLERANCE
from benchmarks.gpu_limits import Clock, free_memory, relative_norm
from benchmarks.gpu_torch import load
from suture.core.command import FOUND_DIFFERENCE, CommandParser, run
from suture.core.errors import UserError
from suture.core.weights import load_graph, streamed_bytes, weights_root
from suture.generate import batch
from suture.generate.text import TextStream
from suture.models.architectures import open_checkpoint
from suture.models.named import presets
from suture.runtime.graphs import OWN_OPERATORS, OnnxDecoder, fast_session, open_to_generate
from suture.serve.request import Sampling
from suture.serve.speed import Speed

ROOT = Path(__file__).parents[1]
ROWS, GENERATING = 3, 2  # rows of the steps' batch, and of generate's
CHUNKS = 4  # that a row of the cache has room for
TIE = 1e-2  # of the largest logit: a token so close to the likeliest is as good


@dataclass(frozen=True)
class TimedStep:
    what: str
    first: int  # of the adjacent rows that take part
    counts: tuple[int, ...]  # tokens that each of them reads
    kept: int | None = None  # where a row is begun anew: how many of its tokens stay

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.counts))


@dataclass(frozen=True)
class RowAccuracy:
    """A row's logits in a step with float32's, and its likeliest tokens: as many the same, and more tied with them."""

    error: float
    allowed: float
    same: int
    tied: int
    tokens: int

    @property
    def right(self) -> bool:
        return self.error <= self.allowed and self.same + self.tied == self.tokens


def script(chunk: int) -> list[TimedStep]:
    """A row has read at most 2 · chunk + 16 tokens in the end."""
    short, long = chunk // 4, chunk // 2 + 1
    decode = TimedStep("decode", 0, (1,) * ROWS)
    return [
        TimedStep("prompt", 0, (short,)),
        TimedStep("prompt of the same width", 1, (short,)),
        TimedStep("prompt of another width", 2, (short + 1,)),
        decode,
        decode,
        decode,
        TimedStep("row begun anew", 1, (long,), kept=0),
        TimedStep("first chunk", 2, (chunk,), kept=0),
        TimedStep("second chunk", 2, (chunk,)),
        decode,
        decode,
        TimedStep("decode of two rows", 1, (1, 1)),
        decode,
        TimedStep("ragged", 0, (3, 1, 2)),
        TimedStep("decode, a row idle", 0, (1, 0, 1)),
        TimedStep("beginning kept", 0, (short,), kept=1),
        TimedStep("prompt of all rows", 0, (2,) * ROWS),
        decode,
        decode,
    ]


class Check:
    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, options.device
        self.clock, self.differences = Clock(), 0
        self._make()
        checkpoint = open_checkpoint(options.work / "checkpoint")
        self.exact = load(checkpoint, torch.float32, self.device)
        self.eager = load(checkpoint, getattr(torch, options.dtype), self.device)
        self.model = options.work / "surgery" / "model.onnx"
        self.clock.say("weights loaded")

    def main(self) -> int:
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}")
        graph = open_to_generate(self.model, self.device)
        if self.device == "cpu":  # nothing is captured, but the same graph decodes
            own, root = load_graph(self.model.with_name(OWN_OPERATORS)), weights_root(self.model)
            graph = replace(graph, decoding=lambda rows: fast_session(own, root, OWN_OPERATORS, "cpu"))
        self.clock.say("session opened")
        self._steps(graph, "two sessions")
        self._steps(replace(graph, decoding=lambda rows: None), "one session")
        speed = self._generate(graph)
        self.clock.say(f"{self.differences} differences")
        if self.differences:
            return FOUND_DIFFERENCE
        print("\n".join(speed.lines()))
        return 0

    def _make(self) -> None:
        work, capacity = self.options.work, CHUNKS * self.options.chunk
        source = ["--preset", self.options.preset] if self.options.preset else ["--config", self.options.config]
        layers = ["--layers", self.options.layers] if self.options.layers else []
        if not (work / "checkpoint" / "config.json").exists():
            self._stage("suture.models.random_checkpoint", "checkpoint", *source, *layers, "--dtype", self.options.dtype)
        self._stage("export", "export", "--checkpoint", work / "checkpoint")
        self._stage("surgery", "surgery", work / "export" / "model.onnx", "--capacity", capacity, "--onnxruntime")

    def _stage(self, module: str, folder: str, *arguments: object) -> None:
        command = [sys.executable, "-m", module, *map(str, arguments), "--out", str(self.options.work / folder)]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise UserError(f"python -m {module}", f"ended with {status}", "see what it says above")
        self.clock.say(module)

    def _steps(self, graph: OnnxDecoder, how: str) -> None:
        decoder, random = graph.decoder(ROWS), np.random.default_rng(0)
        apart = decoder.session.decoding is not graph.session
        self._judge(apart == (how == "two sessions"), f"{how}: decoding has {'its own' if apart else 'none of its own'}")
        read: list[list[int]] = [[] for _ in range(ROWS)]
        for step in script(self.options.chunk):
            if step.kept is not None:
                decoder.keep(step.first, step.kept)
                del read[step.first][step.kept :]
            tokens = random.integers(graph.vocab, size=(len(step.counts), max(step.counts)))
            logits = decoder.advance(tokens, np.array(step.counts), np.ones(len(step.counts), np.float32), step.rows)
            compared = []
            for row, added, count, found in zip(read[step.rows], tokens, step.counts, logits):
                row.extend(added[:count].tolist())
                if count:
                    compared.append(self._compare(row, found[:count].float()))
            lengths = "+".join(map(str, step.counts)), ", ".join(str(len(row)) for row in read[step.rows])
            self._judge(
                all(each.right for each in compared), f"{how}: {step.what} {lengths[0]} (now {lengths[1]}): {_told(compared)}"
            )
        del decoder
        free_memory(self.device)

    def _generate(self, graph: OnnxDecoder) -> Speed:
        """Prompts that take the rows in turn, the longest in chunks; then a next turn, for which the cache holds most."""
        random, chunk, new = np.random.default_rng(1), self.options.chunk, self.options.tokens
        lengths = (chunk // 2, chunk // 4, 2 * chunk + 2, chunk // 4, 1, chunk)
        prompts = [random.integers(graph.vocab, size=length).tolist() for length in lengths]
        speed = Speed(streamed_bytes(load_graph(self.model)))
        loop = batch.Batch(graph, GENERATING, Sampling(), graph.vocab, chunk, speed)

        def answered(first: int, asked: list[list[int]]) -> None:
            text = TextStream(lambda ids: "")  # random weights have no tokenizer
            sequences = [batch.Sequence(first + i, prompt, new - i, frozenset(), text) for i, prompt in enumerate(asked)]
            for done in loop.run(iter(sequences), lambda sequence, piece: None):
                tokens = [*done.prompt, *done.answer[:-1]]
                exact = _logits(self.exact, tokens, len(done.answer))
                same, tied = _agreement(torch.tensor(done.answer, device=self.device), exact)
                what = f"generate: prompt {done.index} of {len(done.prompt)}: {same} tokens the same, {tied} tied"
                self._judge(same + tied == len(done.answer) == new - done.index + first, f"{what}, of {len(done.answer)}")

        answered(0, prompts)
        answered(len(prompts), [[*loop.scheduler.rows[0].held, *random.integers(graph.vocab, size=2).tolist()]])
        self._judge(speed.reused > 0, f"generate: {speed.reused} tokens were in the cache already")
        return speed

    def _compare(self, tokens: list[int], found: Tensor) -> "RowAccuracy":
        """The logits of the last of these tokens with transformers', which reads all of them at once."""
        exact, eager = (_logits(model, tokens, len(found)) for model in (self.exact, self.eager))
        allowed = max(TOLERANCE * relative_norm(eager, exact), ROUNDING)
        return RowAccuracy(relative_norm(found, exact), allowed, *_agreement(found.argmax(-1), exact), len(found))

    def _judge(self, right: bool, what: str) -> None:
        self.differences += not right
        print(f"{'right' if right else 'WRONG'}  {what}", flush=True)


def _told(rows: list[RowAccuracy]) -> str:
    worst = max(rows, key=lambda row: (not row.right, row.error / row.allowed))
    same, tied, tokens = (sum(counted) for counted in zip(*((row.same, row.tied, row.tokens) for row in rows)))
    return f"error {worst.error:.1e} (at most {worst.allowed:.1e}), {same} tokens the same, {tied} tied, of {tokens}"


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: list[int], last: int) -> Tensor:
    """float32 [last,vocab]: of the last tokens of a row, all of which is read at once."""
    ids = torch.tensor([tokens], device=model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0].float()


def _agreement(chosen: Tensor, exact: Tensor) -> tuple[int, int]:
    """How many of the chosen tokens [n] are the likeliest by `exact` [n,vocab], and how many more are within a tie."""
    largest, likeliest = exact.max(-1)
    short = largest - exact.gather(-1, chosen[:, None])[:, 0]
    same = chosen == likeliest
    tied = ~same & (short <= TIE * exact.abs().amax(-1))
    return int(same.sum()), int(tied.sum())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="gpu_steps", description="Compare steps and generated tokens with transformers' on the same weights."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=presets(), metavar="NAME", help="an original Qwen's dimensions, such as qwen-7b")
    source.add_argument("--config", metavar="FILE", type=Path, help="another original Qwen's config.json")
    parser.add_argument("--work", metavar="DIR", type=Path, required=True, help="checkpoint, export and surgery lie there")
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of weights (%(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt read in one step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="that generate's loop answers with (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return Check(parser.parse_args(arguments)).main()


if __name__ == "__main__":
    run("gpu_steps", main)

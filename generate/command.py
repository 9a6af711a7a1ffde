"""What the command line asks for: one prompt, a file of prompts, or a conversation."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from suture.core.errors import UserError
from suture.core.named import appearing, check_results
from suture.core.parts import find_parts
from suture.core.weights import load_graph, weight_files, weights_root
from suture.generate.batch import CAPACITY, LENGTH, Batch, Sequence
from suture.generate.opening import Files, find_files, open_model
from suture.generate.prompts import Prompt, opening
from suture.generate.text import TextStream
from suture.models.tokenizer import open_tokenizer
from suture.runtime.seen import FIRST
from suture.serve.request import Sampling
from suture.serve.speed import Speed

if TYPE_CHECKING:
    from suture.generate.looking import PromptPictures
    from suture.generate.speech import Speech

BATCH = 4


class Generator:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        files = find_files(options.out, options.checkpoint)
        if options.results is not None:
            check_results({"--out": options.results}, _read_by(options, files))
        self.opened = open_model(files, options.runtime)
        if extra := self.opened.model.signature.layout:
            wrong = f"its model takes inputs beside text ({', '.join(extra)}), which this has no tokenizer for"
            raise UserError(
                options.out, wrong, "step it from a program of your own: suture.runtime.graphs, suture.core.cpm_inputs"
            )
        self.tokenizer = open_tokenizer(files.checkpoint)
        self.pictures = self._pictures(files)
        self.what = self.opened.what
        self.stop_ids = frozenset(self.tokenizer.stop_ids(options.chat))
        self.speech = self._speech(files)
        self.sampling = Sampling(
            options.temperature,
            options.top_k or 0,
            options.top_p or 1.0,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        self.speed = Speed(self.opened.weight_bytes)

    def _pictures(self, files: Files) -> "PromptPictures | None":
        if not self.options.pictures:
            return None
        from suture.generate.looking import PromptPictures, vision_of  # here: image processors take seconds

        part = vision_of(find_parts(self.options.out), self.options.out)
        pictures = PromptPictures(self.opened, part, files.checkpoint, self.options.pictures)
        self.opened = pictures.opened
        return pictures

    def one(self, prompt: Prompt) -> None:
        """Continues or answers one prompt, shown as it comes."""
        for done in self._batch(1).run(iter([self._sequence(0, prompt)]), _show):
            _finish(done)

    def all(self, prompts: list[Prompt]) -> None:
        """Runs all prompts, the rows of one batch taking them in turn. All are checked before the first runs."""
        sequences = [self._sequence(index, prompt) for index, prompt in enumerate(prompts)]
        batch = self._batch(min(self.options.batch or BATCH, len(sequences)))
        done = batch.run(iter(sequences), lambda sequence, piece: None)
        results = (json.dumps(_result(prompts[each.index], each), ensure_ascii=False) for each in in_order(done))
        _write(results, self.options.results)

    def converse(self, lines: Iterable[str]) -> None:
        """A conversation: each line is a turn of the user's, and only what is new of it is fed."""
        batch = self._batch(1)
        messages = opening(self.options.system)
        spoken = len(messages)  # what comes before the first turn stays
        for index, line in enumerate(_prompted(lines)):
            messages.append({"role": "user", "content": line})
            try:
                sequence = self._turn(index, messages, spoken)
            except UserError as error:
                messages.pop()
                print(f"generate: {error}", file=sys.stderr)
                continue
            for done in batch.run(iter([sequence]), _show):
                _finish(done)
                messages.append({"role": "assistant", "content": done.text.text})

    def listen(self, path: Path) -> None:
        """Writes down what is said in an audio file, shown as it comes."""
        batch = self._batch(1)
        asked = self.speech.listen(path, batch, self._stream, self.options.max_tokens, self.stop_ids,
                                   self.options.language, self.options.translate)  # fmt: skip
        for done in batch.run(asked, _show):
            _finish(done)

    def _speech(self, files: Files) -> "Speech | None":
        """For an encoder-decoder; raises UserError where it is not asked what it can do."""
        signature, asked = self.opened.model.signature, self.options.audio is not None
        if not signature.encoder_caches:
            if asked:
                raise UserError("--audio", f"{self.opened.what} is not a speech model", "give --prompt TEXT")
            return None
        if not asked:
            raise UserError(self.options.out, "is a speech model", "give --audio FILE.wav")
        if "encoder" not in files.others:
            raise UserError(self.options.out, "has no graph of its encoder", "export the checkpoint again")
        from suture.generate.speech import EncoderSession, Speech  # here: it takes a second, and text needs none of it

        speech = Speech(files.checkpoint, EncoderSession(files.others["encoder"], signature, self.opened.device))
        self._check_tokens(speech.tokens, speech.file)
        return speech

    def _check_tokens(self, ids: Iterable[int], where: object) -> None:
        """Raises UserError for tokens that the model does not know: its table of embeddings has no such rows."""
        if beyond := [token for token in ids if not 0 <= token < self.opened.model.vocab]:
            wrong = f"the token {beyond[0]} is beyond the model's vocabulary of {self.opened.model.vocab}"
            raise UserError(where, wrong, "name the checkpoint that the model was exported from, with --checkpoint DIR")

    def _turn(self, index: int, messages: list[dict], spoken: int) -> Sequence:
        """The next turn; the oldest turns are left out as long as all do not fit. Raises UserError, and leaves out none,
        where the turn does not fit alone."""
        kept = list(messages)
        while True:
            try:
                sequence = self._sequence(index, Prompt("this turn", messages=kept))
                break
            except UserError:
                if len(kept) - spoken < 3:
                    raise
                del kept[spoken : spoken + 2]
        if len(kept) < len(messages):
            left_out = (len(messages) - len(kept)) // 2
            print(f"generate: the conversation no longer fits: turns left out at its beginning: {left_out}", file=sys.stderr)
            messages[:] = kept
        return sequence

    def _sequence(self, index: int, prompt: Prompt) -> Sequence:
        model, chunk = self.opened.model, self.opened.chunk
        before = len(model.prefix)
        ids = prompt.ids(self.tokenizer, model.longest and model.longest - before, self.pictures)
        self._check_tokens((token for token in ids if token < FIRST), prompt.where)
        if model.bidirectional and before + len(ids) > chunk:
            wrong = f"the prompt has {len(ids)} tokens, {before} come before it, and a step has room for {chunk}"
            raise UserError(
                prompt.where, wrong, "shorten it, or build with a larger --max-prompt: this model reads it in one step"
            )
        return Sequence(index, ids, self.options.max_tokens, self.stop_ids, self._stream())

    def _stream(self) -> TextStream:
        return TextStream(self.tokenizer.decode, self.options.stop)

    def _batch(self, rows: int) -> Batch:
        if self.opened.rows is not None and rows > self.opened.rows:
            print(f"generate: the engine takes {self.opened.rows} sequences side by side, not {rows}", file=sys.stderr)
            rows = self.opened.rows
        vocab, processors = min(self.tokenizer.size, self.opened.model.vocab), self.speech.processors if self.speech else []
        return Batch(self.opened.model, rows, self.sampling, vocab, self.opened.chunk, self.speed, processors)


def in_order(done: Iterator[Sequence]) -> Iterator[Sequence]:
    """Sequences as they were asked, each as soon as those before it are done."""
    waiting: dict[int, Sequence] = {}
    following = 0
    for sequence in done:
        waiting[sequence.index] = sequence
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _result(prompt: Prompt, sequence: Sequence) -> dict:
    asked = prompt.given or ({"prompt": prompt.text} if prompt.messages is None else {"messages": prompt.messages})
    return {
        **asked,
        "text": sequence.text.text,
        "finish": sequence.finish,
        "prompt_tokens": len(sequence.prompt),
        "tokens": len(sequence.answer),
    }


def _read_by(options: argparse.Namespace, files: Files) -> Iterator[Path | None]:
    """All files that are read for this."""
    yield from (
        options.prompts,
        *options.pictures,
        files.graph,
        files.engine,
        *files.others.values(),
        *files.checkpoint.iterdir(),
    )
    for graph in filter(None, (files.graph, *files.others.values())):
        yield from weight_files(load_graph(graph), weights_root(graph))


def _write(results: Iterator[str], path: Path | None) -> None:
    """One line each: to standard output as they come, or to a file that appears when all are there."""
    if path is None:
        for line in results:
            print(line, flush=True)
        return
    with appearing(path) as file:
        for line in results:
            file.write(f"{line}\n".encode())
    print(f"generate: {path}", file=sys.stderr)


def _prompted(lines: Iterable[str]) -> Iterator[str]:
    """The lines that say something; where somebody types them, a mark shows that it is their turn."""
    lines = iter(lines)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = next(lines, None)
        if line is None:
            return
        if line.strip():
            yield line.strip()


def _show(sequence: Sequence, piece: str) -> None:
    print(piece, end="", flush=True)


def _finish(sequence: Sequence) -> None:
    """Ends the line, and says if the answer was cut."""
    print(flush=True)
    if sequence.finish == LENGTH:
        print(f"generate: cut after {len(sequence.answer)} tokens (--max-tokens)", file=sys.stderr)
    elif sequence.finish == CAPACITY:
        print("generate: cut: the model's cache or positions are full", file=sys.stderr)

"""A pipeline's folder to a scheduler, and what the server has to know of its model."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from suture.core.errors import UserError
from suture.generate.opening import Files, find_files, open_model
from suture.models.tokenizer import open_tokenizer
from suture.serve.app import Application, Limits, ServedModel
from suture.serve.engine import Scheduler
from suture.serve.grammar import grammars
from suture.serve.options import KEY
from suture.serve.speed import Speed
from suture.serve.worker import READY, Worker


@dataclass
class Loading:
    """Called by the worker's thread."""

    options: argparse.Namespace
    files: Files
    model: ServedModel | None = None
    says: str = ""  # for the user

    def __call__(self) -> Scheduler:
        options, opened = self.options, open_model(self.files, self.options.runtime)
        signature = opened.model.signature
        if signature.encoder_caches or signature.layout:
            raise UserError(options.out, "its model takes inputs beside text", "serve one that takes text alone")
        if opened.rows is not None and options.rows > opened.rows:
            raise UserError("--rows", f"the engine takes {opened.rows} sequences side by side", f"give at most {opened.rows}")
        tokenizer = open_tokenizer(self.files.checkpoint)
        vocab = min(tokenizer.size, opened.model.vocab)
        chunk = opened.chunk if signature.bidirectional else min(opened.chunk, options.chunk)
        speed = Speed(opened.weight_bytes)
        scheduler = Scheduler(opened.model, options.rows, chunk, vocab, speed, options.queue, options.lookup)
        longest = opened.model.longest
        self.model = ServedModel(tokenizer, longest, len(signature.prefix), vocab, opened.model.vocab, grammars(tokenizer))
        memory = scheduler.memory()
        self.says = (
            f"{opened.what}; {options.rows} rows"
            + (f" of {longest:,} tokens" if longest else "")
            + f", {memory['caches'] / 1e9:.3g} GB of caches ({memory['slot']:,} bytes a token)"
            + f" beside {opened.weight_bytes / 1e9:.3g} GB of weights"
        )
        return scheduler


def assemble(options: argparse.Namespace, changed: Callable[[str], None] = lambda state: None) -> Application:
    """The server's application; what it serves is loaded once its worker is started. Raises UserError where there is nothing to
    serve. `changed` is called with each of the worker's states, the line of what was loaded for READY."""
    loading = Loading(options, find_files(options.out, options.checkpoint))
    worker = Worker(loading, lambda state: changed(loading.says if state == READY else state))
    limits = Limits(options.max_body, options.max_prompt, options.max_tokens, options.queue_seconds)
    key = options.api_key or os.environ.get(KEY) or None
    return Application(options.name or options.out.resolve().name, worker, lambda: loading.model, limits, key)

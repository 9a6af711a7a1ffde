"""Tokenizers that transformers knows, behind what suture.models.tokenizer.Tokenizer offers. Code that a checkpoint brings along
is never run; its chat template is rendered in a sandbox, in a process of its own."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from suture.core import reader
from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.refusals import refusals
from suture.models.config import read_generation
from suture.models.template import Template

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GENERATION = "generation_config.json"
SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # which are read whole before
READ = (  # all that transformers may look at
    *FILES, GENERATION, "config.json", "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder of them
SILENCE = threading.Lock()
FORMAT = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def can_read(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def check_files(folder: Path) -> None:
    """Raises UserError where one of the files that transformers may open is none, lies elsewhere, or is very large: a FIFO would wait
    for ever."""
    further = [path.relative_to(folder).as_posix() for path in (folder / TEMPLATES).glob("*")]
    for name in filter(lambda name: os.path.lexists(folder / name), (*READ, *further)):
        if reader.status(inside(folder, name)).st_size > reader.JSON_LIMIT:
            raise UserError(folder / name, f"has more than {reader.JSON_LIMIT:,} bytes", "put the checkpoint's own there")
        if name in SMALL:
            reader.read_json(folder / name)


class LibraryTokenizer:
    """Raises UserError where transformers cannot read the folder's files without running code from there."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # here: it takes seconds, and Qwen's own tokenizer needs none of it
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        self.folder = folder
        check_files(folder)
        with self._refusals():
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            self.size = len(self.tokenizer)
            self._stop = self.tokenizer.eos_token_id
        self._generation = read_generation(folder / GENERATION) if (folder / GENERATION).exists() else {}

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Around what the library does with the folder's files. A panic of its Rust would write to standard error."""
        remedy = "put the checkpoint's tokenizer.json there"
        with refusals(self.folder, "holds no tokenizer that transformers can read", remedy), silence():
            yield

    def stop_ids(self, chat: bool) -> set[int]:
        """What ends an answer: the end-of-sequence tokens of generation_config.json and of the tokenizer."""
        named = self._generation.get("eos_token_id")
        ids = named if isinstance(named, list) else [named, self._stop]
        return {token for token in ids if token is not None}

    def encode(self, text: str) -> list[int]:
        """Token ids, with those that the model wants before every text."""
        with self._refusals():
            return self.tokenizer(text)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        with self._refusals():
            return self.tokenizer.decode(list(ids), **FORMAT)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids' text: what to count in bits per byte."""
        return self.decode(ids).encode()

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The checkpoint's chat template for messages {"role": ..., "content": ...}, up to where the assistant begins.
        Raises ValueError where the template refuses them, UserError where there is none."""
        text = self._template.render(list(messages))
        with self._refusals():
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _template(self) -> Template:
        if not self.tokenizer.chat_template:
            raise UserError(self.folder, "has no chat template", "leave out --chat, or put one in its tokenizer_config.json")
        with self._refusals():
            text, tokens = self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map
            return Template(str(text), {name: str(token) for name, token in tokens.items()}, self.folder)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches standard error, not from C either. One thread at a time: another would take the silence for what was there."""
    with SILENCE:
        kept = os.dup(2)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

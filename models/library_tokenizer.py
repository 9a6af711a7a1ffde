"""Tokenizers that transformers knows, behind what suture.models.tokenizer.Tokenizer offers. Code that a checkpoint brings along
is never run; its chat template is Jinja, which transformers renders in a sandbox."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from suture.core.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GENERATION = "generation_config.json"
READ = (  # all that transformers may look at
    *FILES, GENERATION, "config.json", "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
FORMAT = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def can_read(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


class LibraryTokenizer:
    """Raises UserError where transformers cannot read the folder's files without running code from there."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # here: it takes seconds, and Qwen's own tokenizer needs none of it
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        self.folder = folder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError, ImportError) as error:
            wrong = f"holds no tokenizer that transformers can read ({str(error).strip().splitlines()[0]})"
            raise UserError(folder, wrong, "put the checkpoint's tokenizer.json there") from None
        self.size = len(self.tokenizer)

    def stop_ids(self, chat: bool) -> set[int]:
        """What ends an answer: the end-of-sequence tokens of generation_config.json and of the tokenizer."""
        named = self._generation.get("eos_token_id")
        ids = named if isinstance(named, list) else [named, self.tokenizer.eos_token_id]
        return {token for token in ids if token is not None}

    def encode(self, text: str) -> list[int]:
        """Token ids, with those that the model wants before every text."""
        return self.tokenizer(text)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(ids), **FORMAT)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids' text: what to count in bits per byte."""
        return self.decode(ids).encode()

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The checkpoint's chat template for messages {"role": ..., "content": ...}, up to where the assistant begins.
        Raises ValueError where the template refuses them, UserError where there is none."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError(self.folder, "has no chat template", "leave out --chat, or put one in its tokenizer_config.json")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the chat template says: {error}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _generation(self) -> dict:
        try:
            return json.loads((self.folder / GENERATION).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

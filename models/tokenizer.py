"""The tokenizer of a checkpoint folder: Qwen's own, or whatever transformers can read without running anything of it.

Qwen's: byte-level BPE from a `qwen.tiktoken` file, run by tiktoken (tokenization_qwen.py of Qwen/Qwen-7B).

Like the original, `encode` first brings text into Unicode's composed form (NFC). So decode(encode(text)) is `text` in
that form: exact for text that is composed already, which nearly all is, and canonically equal for the rest.
"""

import base64
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import tiktoken

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.reader import read_bytes
from suture.core.refusals import refusals
from suture.models.library_tokenizer import READ, LibraryTokenizer, can_read

VOCABULARY = "qwen.tiktoken"
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant."  # what the original's chat() begins with
SPECIALS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))  # numbered after the ranks


class Tokenizer:
    def __init__(self, ranks: dict[bytes, int]):
        specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
        self._bpe = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
        self.size = len(ranks) + len(specials)
        self.end_of_text, self.im_start, self.im_end = (specials[token] for token in (END_OF_TEXT, IM_START, IM_END))

    def stop_ids(self, chat: bool) -> set[int]:
        """What ends an answer, as get_stop_words_ids of qwen_generation_utils.py has it."""
        return {self.end_of_text, self.im_start, self.im_end} if chat else {self.end_of_text}

    def encode(self, text: str, allow_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """Token ids. What looks like a special token is encoded as the characters it is written with, unless
        `allow_special` names it or is "all" (the original's default, which lets any text end a turn)."""
        allowed = "all" if allow_special == "all" else set(allow_special)
        return self._bpe.encode(unicodedata.normalize("NFC", text), allowed_special=allowed, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD.
        Raises KeyError for an id beyond the vocabulary (config.json's vocab_size is padded)."""
        return self._bpe.decode(list(ids), errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes that the ids stand for: what to count in bits per byte."""
        return self._bpe.decode_bytes(list(ids))

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """ChatML for messages {"role": ..., "content": ...}: one of the system or none, then user and assistant in turn,
        the user last; what the assistant said is stripped, as chat() keeps it. Raises ValueError for any other order."""
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else SYSTEM
        spoken = [message for message in messages if message["role"] != "system"]
        roles = [message["role"] for message in spoken]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] or len(messages) - len(spoken) > 1:
            raise ValueError(f"the roles {', '.join(message['role'] for message in messages)} are not a conversation")
        said = [each["content"].strip() if each["role"] == "assistant" else each["content"] for each in spoken]
        return self.chat_prompt(said[-1], list(zip(said[:-1:2], said[1::2])), system)

    def chat_prompt(self, user: str, turns: Sequence[tuple[str, str]] = (), system: str = "", window: int = 6144) -> list[int]:
        """ChatML up to the point where the assistant begins, as make_context of qwen_generation_utils.py writes it:
        the system's line even if it is empty, then as many of the latest `turns` (what the user said, what the
        assistant answered) as keep system and turns below `window` tokens, then the user's message."""
        newline = self.encode("\n")

        def message(role: str, content: str) -> list[int]:
            return [self.im_start, *self.encode(role), *newline, *self.encode(content), self.im_end]

        opening, kept = message("system", system), []
        for asked, answered in reversed(turns):
            turn = [*newline, *message("user", asked), *newline, *message("assistant", answered)]
            if len(opening) + len(turn) + len(kept) >= window:
                break
            kept = turn + kept
        question = [*newline, *message("user", user), *newline, self.im_start, *self.encode("assistant"), *newline]
        return opening + kept + question


def tokenizer_files(folder: Path | str) -> list[Path]:
    """The files that a checkpoint folder's tokenizer is read from."""
    return [path for name in (VOCABULARY, *READ) if (path := Path(folder) / name).is_file()]


def open_tokenizer(folder: Path | str) -> Tokenizer | LibraryTokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError where there is none, or it is malformed."""
    file = Path(folder) / VOCABULARY
    if not file.exists() and can_read(Path(folder)):
        return LibraryTokenizer(Path(folder))
    ranks = read_ranks(Path(folder))
    with refusals(file, "is not a vocabulary of tiktoken's", "download it again"):
        return Tokenizer(ranks)


def read_ranks(folder: Path) -> dict[bytes, int]:
    """Each token's bytes and rank, of a checkpoint's vocabulary. Raises UserError where the file is malformed or lies elsewhere."""
    file = inside(folder, VOCABULARY)
    lines = read_bytes(file, remedy="put the checkpoint's tokenizer beside its config.json").splitlines()
    ranks = {}
    for number, line in enumerate(filter(None, lines), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(file, f"line {number} is not a token in base64 and its rank", "download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(file, "lacks ranks, or one of the 256 bytes", "download it again")
    return ranks

"""What the model is asked: one prompt, a file of them, or the turns of a conversation, as token ids."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from suture.core.errors import UserError
from suture.core.pictures import with_pictures
from suture.core.reader import parse_json, read_text


@dataclass(frozen=True)
class Prompt:
    where: str  # for errors: the file and line, or the option
    text: str | None = None
    messages: list[dict] | None = None  # instead of text: a conversation for the chat template
    given: dict = field(default_factory=dict)  # the rest of a JSON line, which its result gets too

    def ids(self, tokenizer, longest: int | None, pictures=None) -> list[int]:
        """Token ids, those of `pictures` (suture.generate.looking) among them. Raises UserError where there are none, or more than
        `longest`."""
        texts = [self.text] if self.messages is None else [message["content"] for message in self.messages]
        no_surrogates(texts, self.where)
        text, messages = self.text, self.messages
        if pictures is not None and messages is None:
            text = pictures.text(text, tokenizer)
        elif pictures is not None:
            messages = with_pictures(messages, len(pictures.ids))
        try:
            ids = tokenizer.encode(text) if messages is None else tokenizer.chat(messages)
        except ValueError as error:
            raise UserError(self.where, str(error), "let user and assistant take turns, the user last") from None
        ids = ids if pictures is None else pictures.put(ids, self.where)
        if not ids:
            raise UserError(self.where, "the prompt is empty", "give it at least one token")
        if longest is not None and len(ids) > longest:
            wrong = f"the prompt has {len(ids)} tokens, and the model takes {longest}"
            raise UserError(self.where, wrong, "shorten it, or run surgery with a larger --capacity if the model allows it")
        return ids


def no_surrogates(texts: Iterable[str], where: str) -> None:
    """Raises UserError for text that is none."""
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise UserError(where, "holds a lone surrogate, which is not a character", "write it as UTF-8")


def read_prompts(path: Path, chat: bool, system: str | None) -> list[Prompt]:
    """A prompt a line: of a .jsonl file the objects {"prompt": text} or {"messages": [...]}, else the lines themselves.
    With `chat`, a text is what the user says."""
    lines = read_text(path, "name a file of prompts, one a line").splitlines()
    prompts = [
        _parsed(line, f"{path}, line {number}", chat, system) if path.suffix == ".jsonl"
        else said(line, f"{path}, line {number}", chat, system)
        for number, line in enumerate(lines, 1) if line.strip()
    ]  # fmt: skip
    if not prompts:
        raise UserError(path, "has no prompts", "write one a line")
    return prompts


def said(text: str, where: str, chat: bool, system: str | None) -> Prompt:
    return Prompt(where, messages=[*opening(system), {"role": "user", "content": text}]) if chat else Prompt(where, text)


def opening(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": system}]


def _parsed(line: str, where: str, chat: bool, system: str | None) -> Prompt:
    given = parse_json(line.encode("utf-8", "surrogatepass"), where)
    if isinstance(given.get("prompt"), str):
        prompt = said(given["prompt"], where, chat, system)
        return Prompt(where, prompt.text, prompt.messages, given)
    if _is_conversation(given.get("messages")):
        return Prompt(where, messages=given["messages"], given=given)
    raise UserError(where, "has neither prompt nor messages", 'write {"prompt": "..."} or {"messages": [{"role": ...}, ...]}')


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and messages and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )  # fmt: skip

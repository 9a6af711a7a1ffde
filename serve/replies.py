"""What OpenAI's completions answer with: whole, or as a stream of chunks (server-sent events)."""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from suture.serve.bodies import BadCall
from suture.serve.request import CAPACITY, LENGTH, STOP, Token
from suture.serve.worker import Piece

REASONS = {STOP: "stop", LENGTH: "length", CAPACITY: "length"}
KINDS = {  # by status: what OpenAI's errors call it
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable",
}  # fmt: skip
DONE = b"data: [DONE]\n\n"


def event(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def error(refused: BadCall) -> dict:
    kind = KINDS.get(refused.status, "invalid_request_error")
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


@dataclass
class Choice:
    """One answer of a reply, as it comes."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)  # of each token, characters of the text before it
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        if piece.token is not None:
            self.tokens.append(piece.token)
            self.shown.append(len(self.text))
        self.text += piece.text


@dataclass
class Reply:
    """`read`: a token's id to its text."""

    model: str
    read: Callable[[int], str]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __post_init__(self):
        self.id = self.prefix + secrets.token_hex(12)

    def opening(self, index: int) -> bytes:
        """What a stream says before an answer's first token."""
        return b""

    def piece(self, piece: Piece, told: bool, usage: bool) -> bytes:
        """`told`: log-probabilities are asked for."""
        if not piece.text and not told:
            return b""
        tokens = [piece.token] if piece.token is not None and told else []
        choice = {"index": piece.index, **self._content(piece.text), "logprobs": self._logprobs(tokens, [0]) if told else None}
        return self._chunk([choice | {"finish_reason": None}], usage)

    def end(self, index: int, why: str, usage: bool) -> bytes:
        return self._chunk([{"index": index, **self._content(""), "logprobs": None, "finish_reason": REASONS[why]}], usage)

    def usage(self, usage: dict) -> bytes:
        return event(self._head(self.part) | {"choices": [], "usage": usage})

    def complete(self, choices: Sequence[Choice], told: bool, usage: dict) -> dict:
        made = [
            {"index": each.index, **self._said(each.text), "finish_reason": REASONS[each.finish],
             "logprobs": self._logprobs(each.tokens, each.shown) if told else None}
            for each in choices
        ]  # fmt: skip
        return self._head(self.whole) | {"choices": made, "usage": usage}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict], usage: bool) -> bytes:
        return event(self._head(self.part) | {"choices": choices} | ({"usage": None} if usage else {}))

    def _content(self, text: str) -> dict:
        return {"text": text}

    def _said(self, text: str) -> dict:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[Token], shown: Sequence[int]) -> dict:
        return {
            "tokens": [self.read(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.read(other): value for other, value in token.likeliest} for token in tokens],
            "text_offset": list(shown[: len(tokens)]),
        }


class ChatReply(Reply):
    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], False)

    def _content(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}

    def _said(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, tokens: Sequence[Token], shown: Sequence[int]) -> dict:
        def entry(token: int, value: float | None) -> dict:
            text = self.read(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

        return {
            "content": [
                entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.likeliest]}
                for token in tokens
            ],
            "refusal": None,
        }

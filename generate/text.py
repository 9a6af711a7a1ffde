"""Tokens to text as it can be shown: whole characters, and nothing that may yet turn out to begin a stop word."""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bytes of a character that is not whole


class TextStream:
    """The text of one answer, token by token.

    A token may end inside a character, and what a token reads like may depend on the one before it. So each new piece is
    the difference of two decodings that share a few tokens, and is held back while its last character is not whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_words: Sequence[str] = ()):
        self.decode, self.stop_words = decode, [word for word in stop_words if word]
        self.ids: list[int] = []
        self.context = 0  # first token of those that the next piece is decoded with
        self.decoded = 0  # tokens that are in the text already
        self.held = ""  # text that may begin a stop word
        self.text = ""  # what has been given out
        self.stopped = False  # a stop word came; it is no part of the text

    def add(self, token: int) -> str:
        """What can be shown after this token, often nothing."""
        self.ids.append(token)
        before = self.decode(self.ids[self.context : self.decoded])
        after = self.decode(self.ids[self.context :])
        if after.endswith(UNFINISHED):
            return ""
        self.context, self.decoded = self.decoded, len(self.ids)
        return self._release(after[len(before) :])

    def end(self) -> str:
        """What is still held back, once no more tokens come. A character that never became whole is U+FFFD."""
        if self.stopped:
            return ""
        before = self.decode(self.ids[self.context : self.decoded])
        rest = self._release(self.decode(self.ids[self.context :])[len(before) :])
        if not self.stopped:
            rest += self.held
            self.text += self.held
            self.held = ""
        return rest

    def _release(self, piece: str) -> str:
        """Passes on what neither is nor can become a stop word."""
        pending = self.held + piece
        found = [(place + len(word), place) for word in self.stop_words if (place := pending.find(word)) >= 0]
        if found:
            _, place = min(found)  # the first to be complete, however the text came in tokens
            self.stopped = True
            shown, self.held = pending[:place], ""
        else:
            kept = max((_overlap(pending, word) for word in self.stop_words), default=0)
            shown, self.held = pending[: len(pending) - kept], pending[len(pending) - kept :]
        self.text += shown
        return shown


def _overlap(text: str, word: str) -> int:
    """Characters at the end of `text` that `word` begins with."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)

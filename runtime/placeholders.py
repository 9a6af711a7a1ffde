"""Where pictures stand among the tokens of a text: a checkpoint's config.json names the token that stands for one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from suture.core.errors import UserError
from suture.core.reader import read_json

NAMES = ("image_token_id", "image_token_index")


class Decodes(Protocol):
    """A tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


class Placeholders:
    """`around`: the tokens before and after a picture, if a model has any, where a text does not say."""

    def __init__(self, checkpoint: Path):
        config = read_json(checkpoint / "config.json")
        self.token = next((config[name] for name in NAMES if isinstance(config.get(name), int)), None)
        if self.token is None:
            wrong = "names no image_token_id, which stands for a picture"
            raise UserError(checkpoint / "config.json", wrong, "use the one that came with the weights")
        self.around = [config.get(f"vision_{end}_token_id") for end in ("start", "end")]

    def text(self, text: str, tokenizer: Decodes, count: int) -> str:
        """The text with a placeholder for each of `count` pictures, before all else where it has none."""
        mark = tokenizer.decode([self.token])
        before, after = ("" if each is None else tokenizer.decode([each]) for each in self.around)
        return text if mark in text else f"{before}{mark}{after}" * count + f"\n{text}"

    def put(self, ids: list[int], pictures: Sequence[list[int]], where: object) -> list[int]:
        """Token ids with each picture's own in place of its placeholder. Raises UserError where there are not as many."""
        places = [place for place, token in enumerate(ids) if token == self.token]
        if len(places) != len(pictures):
            wrong = f"has {len(places)} places for pictures, and there are {len(pictures)}"
            raise UserError(where, wrong, "give as many --picture FILE, or leave the placeholders out")
        for place, picture in reversed(list(zip(places, pictures))):
            ids = [*ids[:place], *picture, *ids[place + 1 :]]
        return ids

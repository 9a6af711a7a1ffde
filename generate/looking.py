"""Pictures that prompts are about: their embeddings, computed once, and their ids among a prompt's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from suture.core.errors import UserError
from suture.core.parts import PartFolder
from suture.core.pictures import INSTRUCTION, PIXELS, VISION
from suture.core.read_pictures import read_picture
from suture.generate.opening import GRAPHS, Opened, first_result
from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.tokenizer import Tokenizer
from suture.runtime.looking import Looker, size_of
from suture.runtime.networks import in_onnxruntime
from suture.runtime.placeholders import Placeholders
from suture.runtime.seen import Seen


class PromptPictures:
    """`opened`: the model, whose embeddings are of tokens and of these pictures. Raises UserError where one cannot be read."""

    def __init__(self, opened: Opened, part: PartFolder, checkpoint: Path, files: Sequence[Path]):
        graph = first_result(part.folder, *GRAPHS)
        if graph is None:
            raise UserError(part.folder, "has neither surgery/model.onnx nor export/model.onnx", "run the pipeline")
        if INSTRUCTION in part.inputs:
            wrong = "its vision part reads the question, too, for which there is no tokenizer here"
            raise UserError(part.folder, wrong, "call its parts from a program of your own: suture.runtime.networks")
        looker = Looker(checkpoint, in_onnxruntime(graph, fast=True), size_of(part.inputs[PIXELS]["shape"]))
        self.placeholders = Placeholders(checkpoint)
        seen = Seen(opened.model.embed)
        self.opened = replace(opened, model=replace(opened.model, embed=seen))
        self.ids = [seen.add(*looker.features(read_picture(file))) for file in files]

    def text(self, text: str, tokenizer: LibraryTokenizer | Tokenizer) -> str:
        return self.placeholders.text(text, tokenizer, len(self.ids))

    def put(self, ids: list[int], where: str) -> list[int]:
        return self.placeholders.put(ids, self.ids, where)


def vision_of(parts: Sequence[PartFolder], out: Path) -> PartFolder:
    """The part that pictures go through. Raises UserError where there is none."""
    found = next((part for part in parts if part.name == VISION), None)
    if found is None:
        raise UserError(
            out, f"looks at no pictures: its parts are {', '.join(part.name for part in parts)}", "leave --picture out"
        )
    return found

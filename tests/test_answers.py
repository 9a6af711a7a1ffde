"""Level 5 of a vision-language model: the same model passes, a damaged one does not; pictures have places in a prompt."""

import copy

import pytest
import torch
from onnx import TensorProto
from PIL import Image

from suture.core.errors import UserError
from suture.models.architectures import open_checkpoint
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import open_tokenizer
from suture.runtime.looking import Looker
from suture.runtime.placeholders import Placeholders
from suture.runtime.seen import Seen
from suture.validate.answers import compare_answers, drawn, embedding, in_torch, prompt
from suture.validate.reference import TorchReference, load_reference

FOLDER = checkpoint_folder("tiny-vlm")
SIZE = 64, 64


def opened(module: torch.nn.Module, asked: list) -> TorchReference:
    """The module as a model that has seen the pictures, whose ids the prompts get."""
    looker, seen = Looker(FOLDER, in_torch(module), SIZE), Seen(embedding(module))
    for each in asked:
        ids = seen.add(*looker.features(Image.fromarray(each.picture)))
        each.prompt = prompt(each.question, open_tokenizer(FOLDER), Placeholders(FOLDER), ids)
    return TorchReference("PyTorch", TensorProto.FLOAT, module, seen)


@pytest.mark.seconds
def test_the_same_model_passes_and_a_damaged_one_does_not():
    module = load_reference(open_checkpoint(FOLDER), TensorProto.FLOAT)
    damaged = copy.deepcopy(module)
    damaged.model.multi_modal_projector.act = torch.nn.Identity()
    asked = drawn(SIZE, 0)
    reference, candidate = opened(module, asked), opened(damaged, asked)
    same = compare_answers(reference, reference, open_tokenizer(FOLDER), asked)
    assert same.passed
    assert (same.reference_right, same.candidate_right, same.alike, same.mean_kl) == (12, 12, 12, 0)
    other = compare_answers(reference, candidate, open_tokenizer(FOLDER), asked)
    assert not other.passed
    assert other.reference_right == 12
    assert other.candidate_right <= 9


def test_each_picture_has_its_place():
    places, tokenizer = Placeholders(FOLDER), open_tokenizer(FOLDER)
    assert places.put([1, places.token, 7, places.token], [[100, 101], [102]], "here") == [1, 100, 101, 7, 102]
    with pytest.raises(UserError, match="here: has 1 places for pictures, and there are 2"):
        places.put([1, places.token], [[100], [101]], "here")
    assert places.text("How many shapes?", tokenizer, 2) == "<image><image>\nHow many shapes?"
    assert places.text("<image> How many shapes?", tokenizer, 2) == "<image> How many shapes?"

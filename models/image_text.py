"""Any vision-language model that transformers implements, as parts: pictures to embeddings, tokens to embeddings, and the decoder.

    vision    pixel_values [batch, 3, height, width] → image_features [batch, tokens, hidden]
    embed     input_ids [batch, sequence]            → inputs_embeds [batch, sequence, hidden]
    decoder   a step with a KV cache over embeddings of both kinds

The classes are those that transformers' AutoModelForImageTextToText names for a config.json's model_type; what the decoder computes is
their own forward, as in suture.models.causal_lm. How a family's pictures become embeddings is in suture.models.towers for those that are
known there; of others one picture at a time is taken, through the class's own get_image_features.
"""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from suture.core.errors import UserError
from suture.core.pictures import COUNTS, FEATURES, INSTRUCTION, PIXELS, VISION
from suture.core.refusals import said
from suture.models import causal_lm
from suture.models.causal_lm import AnyCausalLM
from suture.models.config import check_config
from suture.models.parts import DECODER, GRAPH, Part, Port
from suture.models.quantised import check_quantisation
from suture.models.stepped import LEFT_OUT, transformers_refusals
from suture.models.towers import TOWERS, Tower

PREFIX = ""
LANGUAGE = ("model.language_model", "language_model", "lm_head")  # where the classes keep their decoder
REMEDY = "use another model, or add its tower to models/towers"
LARGEST = 1 << 14  # pixels of a side


def knows(config: dict) -> bool:
    """Whether transformers has a class of this kind for config.json's model_type."""
    return config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class AnyImageText(AnyCausalLM):
    """Comes before a transformers class among a class's bases. Its own forward is the decoder's step.

    `picture_size`: height and width in pixels that the graph of the tower gets, `made`: tokens and width of what it makes of
    them. `pictured`: the class's forward needs a picture every time, so that the step is its language model's."""

    tower: Tower
    picture_size: tuple[int, int]
    made: tuple[int, int]
    pictured: bool

    def of_transformers(self, **given: object) -> ModelOutput:
        return self.language_model(**given) if self.pictured else super(AnyCausalLM, self).forward(**given)

    def parts(self) -> tuple[Part, Part]:
        vision = vision_of(shared(self, lambda path: not _below(path, LANGUAGE)), self.tower)
        batch = "batch" if self.tower.many else 1
        pixels = {PIXELS: Port((batch, self.tower.channels, *self.picture_size))}
        if self.tower.instructed:
            asked = (batch, "instruction")
            pixels |= {INSTRUCTION: Port(asked, below=self.config.qformer_config.vocab_size), COUNTS: Port(asked, below=2)}
        features = {FEATURES: Port((batch, *self.made))}
        return (
            Part(VISION, GRAPH, vision.eval(), pixels, features),
            Part("decoder", DECODER, decoder_of(self), takes_embeddings=True),
        )


class Vision(nn.Module):
    """All of a model that its pictures go through, under the names that it has there."""

    def __init__(self, model: PreTrainedModel, tower: Tower):
        super().__init__()
        self._modules, self._parameters = model._modules, model._parameters
        self.whole, self.tower = (model,), tower  # in a tuple: not a module of this one, whose names would begin with it

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, height, width], normalised, to [B, tokens, hidden]."""
        return self.tower.features(self.whole[0], pixel_values)


class InstructedVision(Vision):
    def forward(self, pixel_values: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor) -> Tensor:
        """The same where the tower reads what is asked, too: int64 [B, T], and 1 for each that counts."""
        return self.tower.features(self.whole[0], pixel_values, qformer_input_ids, qformer_attention_mask)


def vision_of(model: PreTrainedModel, tower: Tower) -> Vision:
    return (InstructedVision if tower.instructed else Vision)(model, tower)


def decoder_of(model: AnyImageText) -> AnyImageText:
    """The same without what its pictures go through."""
    return shared(model, lambda path: _below(path, LANGUAGE))


def build(config: dict, where: object) -> PreTrainedModel:
    """The model of a config.json (at `where`, for errors) on device "meta", its tables on the CPU. Raises UserError as
    suture.models.causal_lm.build does, and for a class that keeps its decoder or its pictures' features elsewhere."""
    for key, inner in config.items():
        if key.endswith("_config") and isinstance(inner, dict):
            check_config(inner, f"{where}, {key}")
    check_quantisation(config, where)
    with transformers_refusals(where):
        kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(kept)
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(parsed)]
        parsed._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
        own = {"__module__": model_class.__module__}  # rules go by it
        model = type(model_class.__name__, (AnyImageText, model_class), own)(parsed).eval()
    pixels = inspect.signature(model_class.forward).parameters.get(PIXELS)
    if pixels is None or not any(path.endswith("language_model") for path, _ in model.named_modules()):
        what = f"{model_class.__name__} takes no pixel_values, or keeps its language model elsewhere than in language_model"
        raise UserError(where, what, REMEDY)
    model.pictured = pixels.default is not None
    model.takes = _takes(model)
    causal_lm.make_tables(model, where)
    causal_lm.untie_head(model)
    model.tower = TOWERS.get(config["model_type"], Tower())
    model.picture_size = _usual_size(parsed)
    model.dimensions = causal_lm.dimensions_of(decoder_of(model), where)
    try:
        model.made = _features_shape(model)
    except Exception as error:  # whatever a class does with a picture of that size
        what = f"{model_class.__name__} makes no features of a picture {'x'.join(map(str, model.picture_size))} ({said(error)})"
        raise UserError(where, what, REMEDY) from None
    return model


def set_picture_size(model: nn.Module, size: tuple[int, int], where: str) -> None:
    """The height and width that the tower's graph takes. Raises UserError where it takes another size only."""
    if not isinstance(model, AnyImageText):
        raise UserError(where, "is of vision-language models, and this is none", "leave it out")
    factor = model.tower.factor(model.config)
    if factor is None and size != model.picture_size:
        usual = "x".join(map(str, model.picture_size))
        raise UserError(where, f"its tower takes {usual} pixels, and no other", "leave it out")
    if factor is not None and any(each % factor or each > LARGEST for each in size):
        raise UserError(where, f"is no size of whole patches: {factor} pixels each way", f"name multiples of {factor}")
    model.picture_size = size
    model.made = _features_shape(model)


def shared(model: PreTrainedModel, belongs: Callable[[str], bool], above: str = "") -> PreTrainedModel:
    """A copy of the model with those of its modules and parameters only whose path `belongs` to it; they are the model's own."""
    kept = copy.copy(model)
    kept._parameters = {name: each for name, each in model._parameters.items() if belongs(above + name)}
    kept._modules = {}
    for name, module in model._modules.items():
        paths = [above + name, *(f"{above}{name}.{path}" for path, _ in module.named_parameters())]
        if all(map(belongs, paths)):
            kept._modules[name] = module
        elif any(map(belongs, paths[1:])):
            kept._modules[name] = shared(module, belongs, f"{above}{name}.")
    return kept


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _takes(model: AnyImageText) -> frozenset[str]:
    """What the decoder's step takes."""
    step = model.language_model.forward if model.pictured else super(AnyCausalLM, model).forward
    return frozenset(inspect.signature(step).parameters)


def _features_shape(model: AnyImageText) -> tuple[int, int]:
    """Of a model on device "meta"."""
    given = [torch.zeros(1, model.tower.channels, *model.picture_size, device="meta")]
    if model.tower.instructed:
        given += [torch.ones(1, 2, dtype=torch.int64, device="meta")] * 2
    with torch.no_grad():
        tokens, width = vision_of(copy.deepcopy(model).to("meta"), model.tower)(*given).shape[1:]
    return tokens, width


def _usual_size(config: object) -> tuple[int, int]:
    """What the tower was made for; of one that takes any size, 448 pixels each way."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None) or 448
    return (size, size) if isinstance(size, int) else tuple(size)

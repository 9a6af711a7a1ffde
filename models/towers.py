"""How a family's pictures become embeddings, where transformers' own way of it cannot be traced for any number of pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from suture.models import qwen_tower


def of_transformers(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The class's own get_image_features, of one picture."""
    found = model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
    return torch.cat([each.flatten(0, -2) for each in found])[None] if isinstance(found, list | tuple) else found


def llava(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """LLaVA 1.5: hidden states of one or several of CLIP's layers, the class token left out by "default", through the projector."""
    config, hidden = model.config, model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [config.vision_feature_layer]
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return model.model.multi_modal_projector(torch.cat([hidden[layer][:, first:] for layer in layers], -1))


def q_former(model: PreTrainedModel, pixel_values: Tensor, ids: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """BLIP-2, and with an instruction, int64 [B,T] and which of its tokens count, InstructBLIP: learned queries look at the picture."""
    former, seen = model.qformer, model.vision_model(pixel_values).last_hidden_state
    queries, mask = model.query_tokens.expand(seen.shape[0], -1, -1), None
    count = queries.shape[1]
    if ids is None:
        given = former.layernorm(queries)
    else:
        given = former.embeddings(input_ids=ids, query_embeds=queries)
        mask = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, count), valid], 1)[:, None, None] != 0
    found = former.encoder(given, attention_mask=mask, encoder_hidden_states=seen, query_length=count).last_hidden_state
    return model.language_projection(found[:, :count])


@dataclass(frozen=True)
class Tower:
    """`features`: a model and normalised pictures [B, channels, height, width] to their embeddings [B, tokens, hidden]. `many`: B may be
    any number; else it is 1. `factor`: of a config, of what height and width must be multiples; None where their size is fixed.
    `instructed`: it reads what is asked, too, int64 [B, T] and which of it counts."""

    features: Callable[..., Tensor] = of_transformers
    many: bool = False
    channels: int = 3
    factor: Callable[[object], int | None] = lambda config: None
    instructed: bool = False


TOWERS = {
    "llava": Tower(llava, many=True),
    "blip-2": Tower(q_former, many=True),
    "instructblip": Tower(q_former, many=True, instructed=True),
    "qwen2_vl": Tower(qwen_tower.features, many=True, factor=qwen_tower.factor),
    "qwen2_5_vl": Tower(qwen_tower.features, many=True, factor=qwen_tower.factor),
}

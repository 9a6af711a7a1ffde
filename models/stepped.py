"""Decoders that transformers implements, with their KV cache as arguments and results.

A family's class is transformers' own behind `Stepped`, so what is computed is what transformers computes, and a tensor
has the name that the checkpoint gives it. Nothing is downloaded and no code of a checkpoint runs: classes are named in
the family's file, and only config.json is read.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import logging as transformers_logging
from transformers.cache_utils import DynamicCache

from suture.core.refusals import refusals
from suture.models.config import required
from suture.models.dimensions import Dimensions
from suture.models.quantised import check_quantisation

transformers_logging.set_verbosity_error()

LEFT_OUT = ("auto_map", "quantization_config", "num_labels", "id2label", "label2id")  # code, and what a classifier has
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class Stepped:
    """Comes before a transformers class for causal language models among a class's bases."""

    learned_positions = False  # whether positions are rows of a table, which bounds a sequence's length

    @property
    def dimensions(self) -> Dimensions:
        config = self.config
        heads = config.num_attention_heads
        return Dimensions(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            positions=config.max_position_embeddings if self.learned_positions else None,
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward: int64 [B,S], [B,S], [B,P+S] and caches [B,kv_heads,P,D] to logits
        [B,S,vocab] and caches [B,kv_heads,P+S,D]."""
        cache = DynamicCache(list(zip(past[0::2], past[1::2])))
        mask = self.mask(attention_mask, input_ids.shape[1])
        hidden = self.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        head = self.get_output_embeddings()
        logits = nn.functional.linear(hidden, self.get_input_embeddings().weight) if head is None else head(hidden)
        return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    def mask(self, attention_mask: Tensor, steps: int) -> Tensor | dict[str, Tensor]:
        """What the class takes as its mask, where that is not attention_mask [B,P+S] as it is."""
        return attention_mask


def build(model_class: type[PreTrainedModel], config: dict, where: object, keys: tuple[str, ...] = ()) -> PreTrainedModel:
    """The model of a config.json (at `where`, for errors) on the default device, without the tables that it keeps as
    buffers where that is "meta". A head that is tied to the embedding has no tensor of its own.

    Raises UserError for a missing key (in transformers' general names), a value that transformers refuses, or weights
    that are quantised.
    """
    own_names = model_class.config_class.attribute_map
    for key in (*REQUIRED, *keys):
        if config.get(key) is None and config.get(own_names.get(key)) is None:
            required(config, own_names.get(key, key), where)
    check_quantisation(config, where)
    with transformers_refusals(where):
        parsed = model_class.config_class.from_dict({key: value for key, value in config.items() if key not in LEFT_OUT})
        parsed._attn_implementation = "sdpa"
        if getattr(parsed, "activation_function", None) == "gelu_new":
            parsed.activation_function = "gelu_pytorch_tanh"  # the same function, as one operator of torch
        model = model_class(parsed)
    if parsed.tie_word_embeddings:
        model.set_output_embeddings(None)
    return model


def transformers_refusals(where: object) -> AbstractContextManager[None]:
    """Around what transformers makes of a config.json: its classes raise errors of their own."""
    return refusals(where, "is refused by transformers", "use the config.json that came with the weights")


def remake_tables(model: PreTrainedModel, module: nn.Module, where: object) -> nn.Module:
    """A module that only keeps tables computed from the config (at `where`), made again on the CPU: "meta" has no values."""
    with transformers_refusals(where), torch.device("cpu"):
        return type(module)(model.config)

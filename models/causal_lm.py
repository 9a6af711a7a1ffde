"""Any decoder that transformers implements for causal language modelling, with its KV cache as arguments and results.

A family that needs care has a file in models/families; the others come here. What is computed is transformers' own forward,
head and all (soft caps, scaled logits); the classes are those that transformers' AutoModelForCausalLM names for a config.json's
model_type, so nothing is downloaded and no code of a checkpoint runs.

Three things are not left as transformers has them: masks, which come from suture.models.layers.visible, so that a window is
counted in a row's own tokens; experts, of which each token's are gathered ("batched_mm"), since the other ways decide by values
which expert runs; and a head tied to the embedding, which has no tensor of its own.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from suture.core.errors import UserError
from suture.core.refusals import BrokenFile, said
from suture.models.dimensions import Dimensions
from suture.models.layers import visible, visible_in_chunk
from suture.models.quantised import check_quantisation
from suture.models.stepped import LEFT_OUT, transformers_refusals

PREFIX = ""
REMEDY = "use another model, or add a file for its family to models/families"
CAUSAL, WINDOW, CHUNKS = "create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
MROPE = "mrope_section"  # of rotary parameters: a token has a position in time, down and across
NOT_SET = {True: float("nan"), False: -(1 << 30)}  # of a buffer, by whether it is of floats: nobody has given it values


def knows(config: dict) -> bool:
    """Whether transformers has a class for causal language modelling of config.json's model_type."""
    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class AnyCausalLM:
    """Comes before a transformers class for causal language models among a class's bases."""

    dimensions: Dimensions

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward: int64 [B,S], [B,S], [B,P+S] and caches [B,kv_heads,P,D] to logits
        [B,S,vocab] and caches [B,kv_heads,P+S,D]. In place of token ids embeddings [B,S,hidden]; positions [rows,B,S] where a
        token has several."""
        cache = DynamicCache(list(zip(past[0::2], past[1::2])))
        logits = self.step(input_ids, position_ids, attention_mask, cache)
        return logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    def step(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        given = {"position_ids": position_ids} if "position_ids" in self.takes else {}
        given["inputs_embeds" if input_ids.is_floating_point() else "input_ids"] = input_ids
        with _own_masks(self, attention_mask, input_ids.shape[1]):
            return self.of_transformers(attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given).logits


def build(config: dict, where: object) -> PreTrainedModel:
    """The model of a config.json (at `where`, for errors) on device "meta", its tables on the CPU.

    Raises UserError for what transformers refuses, weights that are quantised, and a model that keeps something other than
    keys and values of every token."""
    check_quantisation(config, where)
    with transformers_refusals(where):
        kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(kept)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
        parsed._attn_implementation = "sdpa" if _computes_by_sdpa(model_class, parsed) else "eager"
        if model_class._can_set_experts_implementation():
            parsed._experts_implementation = "batched_mm"
        takes = frozenset(inspect.signature(model_class.forward).parameters)
        if "past_key_values" not in takes:
            raise UserError(where, f"{model_class.__name__} keeps no KV cache", REMEDY)
        own = {"takes": takes, "of_transformers": model_class.forward, "__module__": model_class.__module__}  # rules go by it
        model = type(model_class.__name__, (AnyCausalLM, model_class), own)(parsed).eval()
    check_layers(model, where)
    make_tables(model, where)
    untie_head(model)
    model.dimensions = dimensions_of(model, where)
    return model


def _computes_by_sdpa(model_class: type[PreTrainedModel], config: object) -> bool:
    """Whether transformers' own call of scaled_dot_product_attention is all of attention: with a soft cap or sinks it is not."""
    text = config.get_text_config()
    return model_class._supports_sdpa and getattr(text, "attn_logit_softcapping", None) is None


def check_layers(model: PreTrainedModel, where: object) -> None:
    """Raises UserError where the config names layers, one word for each, that are no attention with a KV cache."""
    text = model.config.get_text_config()
    named = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    others = sorted(set(map(str, named)) - ATTENTION)
    if others:
        reason = (
            f"{type(model).__name__} has layers of type {', '.join(others)}, which keep something else than keys and values"
        )
        raise UserError(where, reason, REMEDY)


def make_tables(model: PreTrainedModel, where: object) -> None:
    """Gives buffers that no checkpoint has their values, which transformers computes where it initialises weights."""
    saved = set(model.state_dict())
    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for path, module in model.named_modules():
        owner = max((above for above in owners if f"{path}.".startswith(f"{above}." if above else "")), key=len)
        made = [name for name, _ in module.named_buffers(recurse=False) if f"{path}.{name}".lstrip(".") not in saved]
        for name in made:
            buffer = getattr(module, name)
            unset = NOT_SET[buffer.is_floating_point()] if buffer.dtype != torch.bool else False
            setattr(module, name, torch.full_like(buffer, unset, device="cpu"))
        if made:
            with transformers_refusals(where), torch.device("cpu"):
                owners[owner]._init_weights(module)
        for name in made:
            buffer = getattr(module, name)
            unset = buffer.isnan() if buffer.is_floating_point() else buffer == NOT_SET[False]
            if buffer.is_meta or unset.any() or buffer.dtype == torch.bool:
                raise UserError(where, f"transformers does not say what {path}.{name} holds", REMEDY)


class Tied(nn.Module):
    """A head whose weight is an embedding's: x · weightᵀ + bias."""

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None):
        super().__init__()
        self.embedding = (embedding,)  # in a tuple: not a module of this one, which would have a weight of that name
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.embedding[0].weight, self.bias)


def untie_head(model: PreTrainedModel) -> None:
    for tied, source in model.all_tied_weights_keys.items():
        path, _, name = tied.rpartition(".")
        if name == "weight" and tied != source and isinstance(model.get_submodule(path), nn.Linear):
            head = Tied(model.get_submodule(source.rpartition(".")[0]), model.get_submodule(path).bias)
            model.set_submodule(path, head)


def dimensions_of(model: PreTrainedModel, where: object) -> Dimensions:
    """From the caches that one step on device "meta" leaves."""
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    cache = DynamicCache()
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).to("meta").step(tokens, tokens, torch.ones_like(tokens), cache)
    except Exception as error:  # what a model does with device "meta", transformers does not promise
        raise UserError(where, f"{type(model).__name__} takes no step with a KV cache ({said(error)})", REMEDY) from None
    layers = cache.layers
    if not layers or any(type(layer) is not DynamicLayer or layer.keys is None for layer in layers):
        raise UserError(where, f"{type(model).__name__} keeps a state that is not keys and values", REMEDY)
    shapes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers}
    whole = all(layer.keys.shape[::2] == layer.values.shape[::2] == (2, 3) for layer in layers)
    if len(shapes) > 1 or not whole or logits.shape[:2] != (2, 3):
        raise UserError(where, f"{type(model).__name__}'s layers have caches of several shapes {sorted(shapes)}", REMEDY)
    ((kv_heads, head_dim, value_dim),) = shapes
    text = model.config.get_text_config()
    return Dimensions(
        layers=len(layers),
        heads=text.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        hidden=text.hidden_size,
        vocab=logits.shape[2],
        positions=_learned_positions(model, text),
        position_rows=3 if MROPE in (getattr(text, "rope_parameters", None) or {}) else None,
    )


def _learned_positions(model: PreTrainedModel, config: object) -> int | None:
    """Rows of a table of learned positions, where the model has one beside its tokens'."""
    length = getattr(config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return length if any(table.num_embeddings in (length, (length or 0) + 2) for table in tables) else None


@contextmanager
def _own_masks(model: PreTrainedModel, attention_mask: Tensor, steps: int) -> Iterator[None]:
    """While a step runs, the modules of transformers that the model is made of find these makers of masks under the names of
    transformers.masking_utils: by name is the only way in, since each model decides for itself which it calls, and when."""

    def made(seen: Tensor, embeddings: Tensor, more: dict) -> Tensor:
        if any(more.get(name) is not None for name in ("or_mask_function", "and_mask_function", "block_sequence_ids")):
            raise BrokenFile("its mask is more than causal")
        if model.config._attn_implementation == "sdpa":
            return seen
        least = torch.finfo(embeddings.dtype).min
        shown, hidden = (torch.full((), number, dtype=embeddings.dtype, device=seen.device) for number in (0.0, least))
        return torch.where(seen, shown, hidden)

    def causal(config, inputs_embeds, *_, **more):
        return made(visible(attention_mask, steps), inputs_embeds, more)

    def window(config, inputs_embeds, *_, **more):
        return made(visible(attention_mask, steps, config.sliding_window), inputs_embeds, more)

    def chunks(config, inputs_embeds, *_, **more):
        return made(visible_in_chunk(attention_mask, steps, config.attention_chunk_size), inputs_embeds, more)

    own: dict[str, Callable] = {CAUSAL: causal, WINDOW: window, CHUNKS: chunks}
    modules = {sys.modules[type(each).__module__] for each in model.modules() if isinstance(each, PreTrainedModel)}
    places = [(module, name) for module in modules for name in own if hasattr(module, name)]
    theirs = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, own[name])
        yield
    finally:
        for (module, name), maker in zip(places, theirs):
            setattr(module, name, maker)

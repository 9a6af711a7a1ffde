"""Tiny models of other people's families, exported by torch as users export them: random weights, two layers.

python tests/graphs/export.py FAMILY EXPORTER OPSET DTYPE OUT.onnx [eager | static]      EXPORTER: dynamo | torchscript

static: transformers' StaticCache, 24 slots that the step's tokens are scattered into from `past_length` on.
"""

import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

LAYERS, HIDDEN, HEADS, VOCAB, LONGEST = 2, 64, 4, 128, 96
BATCH, SEQUENCE, PAST, SOURCE, CAPACITY = 2, 3, 5, 7, 24

SMALL = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
             "intermediate_size": 96, "max_position_embeddings": LONGEST, "tie_word_embeddings": False,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# fmt: off
GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LONGEST, "bos_token_id": 1, "eos_token_id": 2}

# family -> model class, config class, its arguments, the inputs beside tokens and caches
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 2}, "mask positions"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | {"num_key_value_heads": 2}, "mask positions"),
    "qwen2_bare": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | {"num_key_value_heads": 2}, ""),
    "qwen2_mask": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | {"num_key_value_heads": 2}, "mask"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 32}, "mask positions"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL | {"num_key_value_heads": 2}, "mask positions"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL | {"num_key_value_heads": 1, "head_dim": 32}, "mask positions"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16,
               "layer_types": ["sliding_attention", "full_attention"]}, "mask positions"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, "mask positions"),
    "gpt2_mask": ("GPT2LMHeadModel", "GPT2Config", GPT, "mask"),
    "gptbigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT | {"multi_query": True}, "mask positions"),
    "opt": ("OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN}, "mask"),
    "gptneox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | {"rotary_pct": 0.25}, "mask positions"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 8}, "mask positions"),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL | {"partial_rotary_factor": 0.5}, "mask positions"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}, "mask"),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS,
            "max_seq_len": LONGEST}, "mask"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_target_positions": LONGEST,
        "max_source_positions": SOURCE * 2, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": []}, "cross"),
    "whisper_encoder": ("WhisperForConditionalGeneration", "WhisperConfig", None, "encoder"),
    "sam_vision": ("SamVisionModel", "SamVisionConfig", {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 64, "patch_size": 16,
        "output_channels": 32, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 96}, "vision"),
}  # fmt: skip
FAMILIES["whisper_encoder"] = (*FAMILIES["whisper"][:3], "encoder")


class Decoder(torch.nn.Module):
    """A causal language model with its cache as a flat list of tensors: key and value, layer after layer."""

    def __init__(self, model, attributes: str):
        super().__init__()
        self.model, self.attributes = model, attributes

    def forward(self, input_ids, *rest):
        rest = list(rest)
        named = {}
        if "mask" in self.attributes:
            named["attention_mask"] = rest.pop(0)
        if "positions" in self.attributes:
            named["position_ids"] = rest.pop(0)
        past = rest[0] if isinstance(rest[0], list) else rest
        if "cross" in self.attributes:
            mine, theirs = past[: 2 * LAYERS], past[2 * LAYERS :]
            cache = EncoderDecoderCache(_cache(mine), _cache(theirs))
            hidden = self.model.model.decoder(input_ids, past_key_values=cache, use_cache=True,
                                              encoder_hidden_states=theirs[0].new_zeros(theirs[0].shape[0], 1, HIDDEN))  # fmt: skip
            logits, cache = self.model.proj_out(hidden.last_hidden_state), hidden.past_key_values.self_attention_cache
        else:
            output = self.model(input_ids, past_key_values=_cache(past), use_cache=True, **named)
            logits, cache = output.logits, output.past_key_values
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def _cache(past: list) -> DynamicCache:
    return DynamicCache(list(zip(past[0::2], past[1::2])))


class StaticDecoder(torch.nn.Module):
    """A causal language model over caches of CAPACITY slots, of which the first `past_length` are full."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, past_length, *past):
        past = past[0] if isinstance(past[0], list | tuple) else past
        cache = StaticCache(config=self.model.config, max_cache_len=CAPACITY)
        for layer, keys, values in zip(cache.layers, past[0::2], past[1::2]):
            layer.keys, layer.values, layer.is_initialized = keys.clone(), values.clone(), True
            layer.dtype, layer.device, layer.cumulative_length = keys.dtype, keys.device, past_length.clone()
        logits = self.model(input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class Alone(torch.nn.Module):
    """An encoder: one tensor in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


def build(family: str, attention: str = "sdpa") -> torch.nn.Module:
    """The family's tiny model with random weights, from a fixed seed; norms and biases are disturbed as well."""
    model_class, config_class, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = attention
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def export(family: str, exporter: str, opset: int, dtype: str, out: Path, attention: str = "sdpa") -> None:
    model = build(family, attention).to(getattr(torch, dtype))
    attributes = FAMILIES[family][3]
    names, outputs = ["input_ids"], ["logits"]
    tokens = torch.randint(3, VOCAB, (BATCH, SEQUENCE))
    if attributes in ("encoder", "vision"):
        x = torch.randn(BATCH, 8, SOURCE * 4) if attributes == "encoder" else torch.randn(BATCH, 3, 64, 64)
        wrapper, inputs = Alone(model.model.encoder if attributes == "encoder" else model), (x.to(getattr(torch, dtype)),)
        names, outputs, shapes, axes = ["input_features"], ["last_hidden_state"], ({},), {}
    else:
        wrapper, inputs = Decoder(model, attributes), [tokens]
        auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        shapes, axes = [auto], {"input_ids": {0: "B", 1: "S"}, "logits": {0: "B", 1: "S"}}
        if "mask" in attributes:
            inputs.append(torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64))
            names.append("attention_mask")
            shapes.append(auto)
            axes["attention_mask"] = {0: "B", 1: "T"}
        if "positions" in attributes:
            inputs.append(torch.arange(PAST, PAST + SEQUENCE)[None].repeat(BATCH, 1))
            names.append("position_ids")
            shapes.append(auto)
            axes["position_ids"] = {0: "B", 1: "S"}
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or (1 if getattr(config, "multi_query", False) else HEADS)
        size = getattr(config, "head_dim", None) or HIDDEN // HEADS
        past = [torch.randn(BATCH, heads, PAST, size, dtype=getattr(torch, dtype)) for _ in range(2 * LAYERS)]
        if "cross" in attributes:
            past += [torch.randn(BATCH, heads, SOURCE, size, dtype=getattr(torch, dtype)) for _ in range(2 * LAYERS)]
        kinds = [(i, kind) for i in range(LAYERS) for kind in "kv"]
        names += [f"past_{kind}_{i}" for i, kind in kinds]
        names += [f"cross_{kind}_{i}" for i, kind in kinds] if "cross" in attributes else []
        outputs += [f"present_{kind}_{i}" for i, kind in kinds]
        axes |= {name: {0: "B", 2: "P"} for name in names if name.startswith("past")}
        axes |= {name: {0: "B"} for name in names if name.startswith("cross")}
        axes |= {name: {0: "B", 2: "T"} for name in outputs[1:]}
        grows = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
        each = [grows if name.startswith("past") else {0: torch.export.Dim.AUTO} for name in names[-len(past) :]]
        shapes = (shapes[0], (*shapes[1:], each))
        inputs = (*inputs, past) if exporter == "dynamo" else (*inputs, *past)
    wrapper.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        if exporter == "dynamo":
            torch.onnx.export(wrapper, tuple(inputs), out, input_names=names, output_names=outputs, dynamic_shapes=tuple(shapes),
                              opset_version=opset, dynamo=True, verbose=False, external_data=False)  # fmt: skip
        else:
            torch.onnx.export(wrapper, tuple(inputs), out, input_names=names, output_names=outputs, dynamic_axes=axes,
                              opset_version=opset, dynamo=False)  # fmt: skip


def export_static(family: str, exporter: str, opset: int, dtype: str, out: Path) -> None:
    model = build(family).to(getattr(torch, dtype))
    heads, size = model.config.num_key_value_heads, getattr(model.config, "head_dim", None) or HIDDEN // HEADS
    past = [torch.zeros(BATCH, heads, CAPACITY, size, dtype=getattr(torch, dtype)) for _ in range(2 * LAYERS)]
    tokens, positions = torch.randint(3, VOCAB, (BATCH, SEQUENCE)), torch.arange(PAST, PAST + SEQUENCE).repeat(BATCH, 1)
    names = ["input_ids", "position_ids", "past_length"]
    kinds = [f"{kind}_{layer}" for layer in range(LAYERS) for kind in "kv"]
    names, outputs = names + [f"past_{kind}" for kind in kinds], ["logits"] + [f"present_{kind}" for kind in kinds]
    auto = torch.export.Dim.AUTO
    inputs, wrapper = (tokens, positions, torch.tensor(PAST), *past), StaticDecoder(model).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        if exporter == "dynamo":
            shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {}, tuple({0: auto} for _ in past))
            torch.onnx.export(wrapper, inputs, out, input_names=names, output_names=outputs, dynamic_shapes=shapes,
                              opset_version=opset, dynamo=True, verbose=False, external_data=False)  # fmt: skip
        else:
            axes = {name: {0: "B", 1: "S"} for name in (*names[:2], "logits")} | {name: {0: "B"} for name in names[3:]}
            torch.onnx.export(wrapper, inputs, out, input_names=names, output_names=outputs, dynamic_axes=axes,
                              opset_version=opset, dynamo=False)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    family, exporter, opset, dtype, out, *attention = sys.argv[1:]
    make = export_static if attention == ["static"] else export
    make(family, exporter, int(opset), dtype, Path(out), *(attention if attention != ["static"] else []))

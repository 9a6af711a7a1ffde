"""Every class that transformers has for causal language modelling, at a tiny size, and how far its exported graph is from it."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import logging as transformers_logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from suture.core.signature import LOGITS, MASK, POSITIONS, TOKENS

transformers_logging.disable_progress_bar()

VOCABULARY, LENGTH = 256, 13
STEPS = ((0, 8), (8, 9), (9, LENGTH))  # a prompt, one token, a chunk: longer than the window, which is 8
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 128, "n_inner": 96, "d_model": 64, "ffn_dim": 96, "word_embed_proj_dim": 64, "n_ctx": 128, "num_layers": 2,
    "num_heads": 4, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "rotary_dim": 8, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_shared_experts": 1, "moe_num_experts": 4,
    "moe_k": 2, "shared_expert_intermediate_size": 32, "embedding_size": 64, "query_pre_attn_scalar": 16, "moe_topk": 2,
}  # fmt: skip
DERIVED = ("layer_types", "mlp_layer_types")  # one word a layer, of as many as there are by default
LATENT = "kv_lora_rank"  # with it, every head has its own key


def names() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> dict:
    """A config.json of that type, all that decides its size small and all else as transformers has it by default."""
    default = CONFIG_MAPPING[model_type]()
    small = _small(default)
    if LATENT in small:
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    return {**small, "model_type": model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(default)].__name__]}


def _small(config: PreTrainedConfig) -> dict:
    content, small = config.to_dict(), {}
    general = {own: name for name, own in config.attribute_map.items()}
    for key, value in content.items():
        name = key if key in SMALL else general.get(key, key)
        if name in SMALL and (value is not None or name in ("head_dim", "num_key_value_heads")):
            small[key] = SMALL[name]
        elif key in DERIVED:
            small[key] = None
        elif isinstance(nested := getattr(config, key, None), PreTrainedConfig):
            small[key] = _small(nested)
    return small


def write_checkpoint(config: dict, folder: Path) -> None:
    """As transformers publishes it, random weights from a seed: norms and biases differ from 1 and 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() < 2 else 1.0
            parameter.add_(torch.randn_like(parameter) * spread * min(0.3, parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)


def error_of(graph: Path, checkpoint: Path) -> float:
    """The largest difference of an exported graph's logits, in steps, from transformers' own of the whole text, of their
    largest: transformers' masks, no cache, nothing of this project."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.numpy()
    session = onnxruntime.InferenceSession(graph)
    inputs = {value.name: value.shape for value in session.get_inputs()}
    past = {name: np.zeros([2, shape[1], 0, shape[3]], np.float32) for name, shape in inputs.items() if name.startswith("past")}
    found = []
    for begin, end in STEPS:
        given = {
            TOKENS: tokens[:, begin:end].numpy(),
            POSITIONS: np.tile(np.arange(begin, end), (2, 1)),
            MASK: np.ones((2, end), np.int64),
        }
        given = {name: values for name, values in given.items() if name in inputs}
        results = dict(zip([value.name for value in session.get_outputs()], session.run(None, {**given, **past})))
        found.append(results.pop(LOGITS))
        past = {name.replace("present", "past_key_values"): values for name, values in results.items()}
    return float(np.abs(np.concatenate(found, 1) - expected).max() / np.abs(expected).max())

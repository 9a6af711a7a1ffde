"""Vision-language models of transformers' own classes at tiny sizes, random, and what they make of pictures and text."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
QFORMER = {"model_type": "blip_2_qformer", "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 96, "encoder_hidden_size": 48}  # fmt: skip
BLIP_VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
               "patch_size": 7}  # fmt: skip
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
CONFIGS = {
    "llava": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 90,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 48},
        "text_config": {"model_type": "llama", **TEXT},
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": 90,
        "vision_start_token_id": 91, "vision_end_token_id": 92,
        "vision_config": {"depth": 3, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
                          "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        "text_config": QWEN_TEXT,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "image_token_id": 90,
        "vision_start_token_id": 91, "vision_end_token_id": 92,
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4, "patch_size": 4},
        "text_config": QWEN_TEXT,
    },
    "blip-2": {
        "model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"], "image_token_index": 90, "num_query_tokens": 5,
        "vision_config": BLIP_VISION, "qformer_config": QFORMER,
        "text_config": {"model_type": "opt", "vocab_size": 96, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256},
    },
    "instructblip": {
        "model_type": "instructblip", "architectures": ["InstructBlipForConditionalGeneration"], "image_token_index": 90,
        "num_query_tokens": 5, "vision_config": BLIP_VISION, "qformer_config": {**QFORMER, "model_type": "instructblip_qformer"},
        "text_config": {"model_type": "llama", **TEXT},
    },
}  # fmt: skip


def write_checkpoint(name: str, folder: Path, changed: dict | None = None) -> None:
    """As transformers publishes it, random weights from a seed: norms and biases differ from 1 and 0. `changed`: keys of its config."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name].from_dict(CONFIGS[name] | (changed or {}))
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() < 2 else 1.0
            parameter.add_(torch.randn_like(parameter) * spread * min(0.3, parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)

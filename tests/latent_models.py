"""SDXL, Stable Diffusion 3 and FLUX of random weights at tiny sizes, in diffusers' layout."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

PIPELINES = {
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "stable_diffusion_3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
DENOISER = {"stable_diffusion_xl": "unet", "stable_diffusion_3": "transformer", "flux": "transformer"}
VOCABULARY = 585  # of tiny-sd's tokenizer
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "tiny-sd"


def clip(projects: bool, hidden: int = 32) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=24, bos_token_id=583, eos_token_id=584, pad_token_id=584,
        hidden_act="gelu" if projects else "quick_gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5() -> torch.nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8, relative_attention_max_distance=12,
        )
    )  # fmt: skip


def vae(**more) -> torch.nn.Module:
    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


def networks(family: str) -> dict[str, torch.nn.Module]:
    """By their folders' names, in eval mode; norms and biases are disturbed as well."""
    torch.manual_seed(0)
    made = {"stable_diffusion_xl": _xl, "stable_diffusion_3": _sd3, "flux": _flux}[family]()
    for network in made.values():
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def checkpoint(family: str, folder: Path) -> Path:
    for name, network in networks(family).items():
        network.save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(SHIPPED / name, folder / name)
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[family]}))
    return folder


def _xl() -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    return {"text_encoder": clip(False), "text_encoder_2": clip(True), "unet": unet, "vae": vae(force_upcast=True)}


def _sd3() -> dict[str, torch.nn.Module]:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48, pos_embed_max_size=12,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    plain = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    texts = {"text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": t5()}
    return {**texts, "transformer": transformer, "vae": plain}


def _flux() -> dict[str, torch.nn.Module]:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    plain = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    return {"text_encoder": clip(False), "text_encoder_2": t5(), "transformer": transformer, "vae": plain}

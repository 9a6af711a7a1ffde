"""A small Stable Diffusion of random weights, in diffusers' layout and in the single-file layout of the original code."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "tiny-sd"
WIDTHS, SIDE = (16, 32), 16
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def networks(hint: tuple[int, ...] = (8, 16)) -> dict[str, torch.nn.Module]:
    """UNet and ControlNet of two levels, which halve the latents once; an autoencoder of half its picture's sides. `hint`: widths of
    the ControlNet's first convolutions, of which all but the last halve its picture."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=585, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=32, bos_token_id=583, eos_token_id=584, pad_token_id=584,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint)
    for block in (
        *controlnet.controlnet_down_blocks,
        controlnet.controlnet_mid_block,
        controlnet.controlnet_cond_embedding.conv_out,
    ):
        torch.nn.init.normal_(block.weight, std=0.05)  # which begin as zeros
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return {"text_encoder": CLIPTextModel(text), "unet": unet, "controlnet": controlnet, "vae": vae}


def checkpoint(folder: Path, hint: tuple[int, ...] = (8, 16)) -> Path:
    for name, network in networks(hint).items():
        network.eval().save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(SHIPPED / name, folder / name)
    index = {"_class_name": "StableDiffusionControlNetPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def original(found: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of text encoder, UNet and autoencoder as stable-diffusion-v1-5's .ckpt has them."""
    text = {
        f"cond_stage_model.transformer.text_model.{name}": value for name, value in found["text_encoder"].state_dict().items()
    }
    unet = {f"model.diffusion_model.{_unet(name)}": value for name, value in found["unet"].state_dict().items()}
    return (
        text
        | unet
        | {f"first_stage_model.{_vae(name)}": _vae_value(name, value) for name, value in found["vae"].state_dict().items()}
    )


def original_control(controlnet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As control_sd15_canny.pth has them."""
    return {f"control_model.{_control(name)}": value for name, value in controlnet.state_dict().items()}


def _unet(name: str) -> str:
    layers = 1
    simple = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    for new, old in simple.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    level, kind, number, rest = re.fullmatch(r"(?:(?:down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.*)", name).groups()
    number = int(number)
    if name.startswith("mid_block"):
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}." + _inner(kind, rest)
    if name.startswith("down_blocks"):
        first = (layers + 1) * int(level) + 1
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + number}.{int(kind == 'attentions')}." + _inner(kind, rest)
    first = (layers + 1) * int(level)
    if kind == "upsamplers":  # after the attention, where the block has one
        return f"output_blocks.{first + layers}.{1 if level == '0' else 2}.{rest}"
    return f"output_blocks.{first + number}.{int(kind == 'attentions')}." + _inner(kind, rest)


def _inner(kind: str, rest: str) -> str:
    part, _, last = rest.partition(".")
    return rest if kind == "attentions" else f"{RESNET[part]}.{last}"


def _control(name: str) -> str:
    part, _, last = name.rpartition(".")
    if part.startswith("controlnet_cond_embedding."):
        inner = part.partition(".")[2]
        place = {"conv_in": 0, "conv_out": 14}.get(inner) if inner[0] == "c" else 2 + 2 * int(inner[-1])
        return f"input_hint_block.{place}.{last}"
    if part.startswith("controlnet_down_blocks."):
        return f"zero_convs.{part.rpartition('.')[2]}.0.{last}"
    return f"middle_block_out.0.{last}" if part == "controlnet_mid_block" else _unet(name)


def _vae(name: str) -> str:
    def up(found: re.Match) -> str:
        return f"up.{1 - int(found[1])}."

    renamed = re.sub(r"up_blocks\.(\d)\.", up, name)
    for pattern, text in (
        (r"down_blocks\.(\d)\.", r"down.\1."), (r"(up|down)\.(\d)\.resnets\.", r"\1.\2.block."), (r"(up|down)samplers\.0\.", r"\1sample."),
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), (r"to_out\.0", "proj_out"),
        ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ):  # fmt: skip
        renamed = re.sub(pattern, text, renamed)
    return renamed


def _vae_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """Attention's products were convolutions."""
    linear = "attentions" in name and name.endswith("weight") and "group_norm" not in name
    return value[:, :, None, None] if linear else value

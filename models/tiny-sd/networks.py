"""tiny-sd's networks, of diffusers' own classes: untrained ones, those of a checkpoint, and how they are written."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

SIDE = 64  # pixels
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip


@dataclass
class Models:
    tokenizer: Tokenizer
    text: CLIPTextModel
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL

    def encode(self, captions: list[str], device: torch.device) -> Tensor:
        return torch.tensor([each.ids for each in self.tokenizer.encode_batch(captions)], device=device)


def untrained(tokenizer_file: Path, device: torch.device) -> Models:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    vocabulary = tokenizer.get_vocab()
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    length = 24
    tokenizer.enable_padding(length=length, pad_id=end, pad_token="<|endoftext|>")
    tokenizer.enable_truncation(length)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, projection_dim=64, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with device:
        unet = UNet2DConditionModel(
            sample_size=SIDE // 4, block_out_channels=(48, 64, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=64,
            attention_head_dim=(3, 4, 4),  # which diffusers takes as the number of heads
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=16, latent_channels=4, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        controlnet = control_of(unet)
        return Models(tokenizer, CLIPTextModel(text), unet, controlnet, vae)


def trained(folder: Path, tokenizer: Tokenizer, device: torch.device) -> Models:
    classes = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
    found = [each.from_pretrained(folder / name).float().to(device).eval() for name, each in classes.items()]
    return Models(tokenizer, *found)


def control_of(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that begins as the UNet's first half, as all do."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32)).to(unet.device)


def save(models: Models, out: Path) -> None:
    """In diffusers' layout, as float16."""
    for name, module in (
        ("text_encoder", models.text),
        ("unet", models.unet),
        ("controlnet", models.controlnet),
        ("vae", models.vae),
    ):
        copy.deepcopy(module).half().save_pretrained(out / name, safe_serialization=True)
    DDIMScheduler(**SCHEDULE).save_pretrained(out / "scheduler")

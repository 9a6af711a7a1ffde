"""Stable Diffusion 1 and 2, with a ControlNet where there is one beside it: diffusers' and transformers' own classes.

Four graphs: the text encoder once for a prompt; at each denoising step the ControlNet and the UNet, which takes its residuals; the
decoder of the autoencoder once for the latents. A picture's sides are a multiple of the latents', and these may have any that the UNet
can halve as often as it does.
"""

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from suture.core.errors import UserError
from suture.core.refusals import refusals
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline")
PREFIX = ""
NETWORKS, OPTIONAL = ("text_encoder", "unet", "vae"), ("controlnet",)
REMEDY = "use the config.json that came with the weights"
OLD_NAMES = {  # of attention in autoencoders, and of the text encoder's modules, as published
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.", "text_encoder.text_model.": "text_encoder.",
}  # fmt: skip


def renamed(name: str) -> str:
    """A published tensor's name, as the classes have it today."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


class StableDiffusion(nn.Module):
    """Networks by their folders' names. `configs`: their config.json."""

    def __init__(self, configs: dict[str, dict], networks: dict[str, nn.Module]):
        super().__init__()
        self.configs = configs
        for name, network in networks.items():
            self.add_module(name, network)

    def parts(self) -> tuple[Part, ...]:
        text, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        tokens, channels, width = text.max_position_embeddings, unet.in_channels, unet.cross_attention_dim
        latents, embeddings = Port(("batch", channels, "height", "width")), Port(("batch", tokens, width))
        step = {"sample": latents, "timestep": Port(("batch",), below=1000), "encoder_hidden_states": embeddings}
        halved = 2 ** (len(unet.block_out_channels) - 1)
        whole = {"height": halved, "width": halved}
        told = {"encoder_hidden_states": "text_encoder/last_hidden_state"}
        ids = {"input_ids": Port(("batch", tokens), below=text.vocab_size)}
        parts = [Part("text_encoder", GRAPH, TextEncoder(self.text_encoder), ids, {"last_hidden_state": embeddings})]
        residuals = {}
        if hasattr(self, "controlnet"):
            residuals = dict(_residuals(self.controlnet.config))
            hint = _times(2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1))
            inputs = {**step, "controlnet_cond": Port(("batch", self.controlnet.config.conditioning_channels, *hint))}
            parts.append(Part("controlnet", GRAPH, Control(self.controlnet), inputs, residuals, told, whole))
        reads = {**told, **{name: f"controlnet/{name}" for name in residuals}}
        denoised = {"out_sample": Port(("batch", unet.out_channels, "height", "width"))}
        parts.append(Part("unet", GRAPH, Denoiser(self.unet), {**step, **residuals}, denoised, reads, whole))
        picture = {"sample": Port(("batch", vae.out_channels, *_times(2 ** (len(vae.block_out_channels) - 1))))}
        parts.append(Part("vae_decoder", GRAPH, LatentDecoder(self.vae), {"latent_sample": latents}, picture))
        return tuple(parts)


class TextEncoder(nn.Module):
    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B,T] to [B,T,hidden]."""
        return self.text_encoder(input_ids).last_hidden_state


class Control(nn.Module):
    def __init__(self, controlnet: nn.Module):
        super().__init__()
        self.controlnet = controlnet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor) -> list[Tensor]:
        """Latents [B,C,h,w], int64 [B], [B,T,hidden] and a picture [B,3,H,W] from 0 to 1, to what the UNet adds to each of its skip
        connections and to its middle."""
        down, middle = self.controlnet(sample, timestep, encoder_hidden_states, controlnet_cond, return_dict=False)
        return [*down, middle]


class Denoiser(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *residuals: Tensor) -> Tensor:
        """Latents [B,C,h,w], int64 [B], [B,T,hidden] and a ControlNet's results, to the noise that is in the latents."""
        *down, middle = residuals or (None,)
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            down_block_additional_residuals=tuple(down) or None,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


class LatentDecoder(nn.Module):
    """Of an autoencoder, whose other half is left out."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Latents [B,C,h,w], divided by the config's scaling_factor, to pictures [B,3,H,W] from -1 to 1."""
        return self.vae.decoder(self.vae.post_quant_conv(latent_sample))


def _residuals(config) -> Iterator[tuple[str, Port]]:
    """A ControlNet's results: one for the first convolution, for each resnet and for each halving, and one for the middle."""
    layers, widths = config.layers_per_block, config.block_out_channels
    found = [(widths[0], 1)]
    for level, channels in enumerate(widths):
        found += [(channels, 2**level)] * layers
        if level < len(widths) - 1:
            found.append((channels, 2 ** (level + 1)))
    for number, (channels, by) in enumerate(found):
        yield f"down_block_res_sample_{number}", Port(("batch", channels, *_divided(by)))
    yield "mid_block_res_sample", Port(("batch", widths[-1], *_divided(2 ** (len(widths) - 1))))


def _times(factor: int) -> tuple[str, str]:
    return ("height", "width") if factor == 1 else (f"{factor}*height", f"{factor}*width")


def _divided(by: int) -> tuple[str, str]:
    return ("height", "width") if by == 1 else (f"height/{by}", f"width/{by}")


def build(config: dict, where: object) -> StableDiffusion:
    networks = {name: network(name, own, where) for name, own in config["networks"].items()}
    return StableDiffusion(config["networks"], networks)


def network(name: str, config: dict, where: object) -> nn.Module:
    """One of the networks, as its config.json says; of the autoencoder what makes pictures of latents."""
    diffusers = library(where)
    classes = {"unet": diffusers.UNet2DConditionModel, "controlnet": diffusers.ControlNetModel, "vae": diffusers.AutoencoderKL}
    with refusals(where, f"{name} is refused by diffusers", REMEDY):
        made = classes[name].from_config(config) if name in classes else text_encoder(config)
    if name == "vae":
        made.encoder = made.quant_conv = None  # which only pictures that come in need
    return made


def text_encoder(config: dict) -> nn.Module:
    """CLIP's, with the positions that it keeps as a table on the CPU."""
    model = CLIPTextModel(CLIPTextConfig.from_dict(config))
    model.embeddings.position_ids = torch.arange(model.config.max_position_embeddings, device="cpu")[None]
    return model


def library(where: object) -> ModuleType:
    """diffusers, which takes seconds to import and may not be installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(where, "needs diffusers, which is not installed", "pip install -r requirements.txt")
    import diffusers

    diffusers.logging.set_verbosity_error()
    return diffusers

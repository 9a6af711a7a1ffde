"""What models share whose pictures come out of an autoencoder's latents: text encoders, the autoencoder's halves, names of axes.

Networks are diffusers' and transformers' own classes. A family (suture.models.families.stable_diffusion and others) says which of
them its pipeline has, and what the network between them takes at a denoising step.
"""

import importlib.util
import re
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from suture.core.errors import UserError
from suture.core.refusals import refusals
from suture.models.parts import GRAPH, Part, Port

REMEDY = "use the config.json that came with the weights"
PUBLISHED = {  # names of attention in autoencoders, of CLIP's layers and of T5's table, as the classes here have them
    r"^vae\.(.*)\.query\.": r"vae.\1.to_q.",
    r"^vae\.(.*)\.key\.": r"vae.\1.to_k.",
    r"^vae\.(.*)\.value\.": r"vae.\1.to_v.",
    r"^vae\.(.*)\.proj_attn\.": r"vae.\1.to_out.0.",
    r"^(text_encoder(_\d)?)\.text_model\.": r"\1.",
    r"^(text_encoder(_\d)?)\.encoder\.embed_tokens\.": r"\1.shared.",
}


class LatentDiffusion(nn.Module):
    """Networks by their folders' names. `configs`: their config.json."""

    def __init__(self, configs: Mapping[str, dict], networks: Mapping[str, nn.Module]):
        super().__init__()
        self.configs = configs
        for name, network in networks.items():
            self.add_module(name, network)


class Clip(nn.Module):
    """`network`: its name in the checkpoint. `results`: what the pipeline reads of it: last_hidden_state, hidden_states, text_embeds."""

    def __init__(self, network: str, encoder: nn.Module, results: tuple[str, ...]):
        super().__init__()
        self.network, self.results = network, results
        self.add_module(network, encoder)

    def forward(self, input_ids: Tensor) -> Tensor | list[Tensor]:
        """int64 [B,T] to what the last layer gives, normalised, or the one before it as it is, both [B,T,hidden]; and to the end
        token's, projected where the model projects it, [B,width]."""
        encoder = getattr(self, self.network)
        found = encoder(input_ids, output_hidden_states="hidden_states" in self.results)
        given = []
        for result in self.results:
            if result == "text_embeds":
                projection = getattr(encoder, "text_projection", None)
                given.append(found.pooler_output if projection is None else projection(found.pooler_output))
            else:
                given.append(found.hidden_states[-2] if result == "hidden_states" else found.last_hidden_state)
        return given[0] if len(given) == 1 else given


class T5(nn.Module):
    def __init__(self, network: str, encoder: nn.Module):
        super().__init__()
        self.network = network
        self.add_module(network, encoder)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B,T], all of which count, to [B,T,hidden]."""
        model = getattr(self, self.network)
        return model.encoder(inputs_embeds=model.shared(input_ids)).last_hidden_state


class LatentEncoder(nn.Module):
    """Of an autoencoder: what a picture to begin with becomes."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        """Pictures [B,3,H,W] from -1 to 1 to the mean of each latent and, behind these, the logarithm of its variance [B,2C,h,w]."""
        found, behind = self.vae.encoder(sample), self.vae.quant_conv
        return found if behind is None else behind(found)


class LatentDecoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Latents [B,C,h,w], divided by the config's scaling_factor, to pictures [B,3,H,W] from -1 to 1."""
        behind = self.vae.post_quant_conv
        return self.vae.decoder(latent_sample if behind is None else behind(latent_sample))


def text_encoder(config: dict) -> nn.Module:
    """transformers' class that its config.json names, on the default device: T5's, whose table of embeddings, which has two names,
    is the one called `shared`; or CLIP's, with the table of positions on the CPU and, where it projects, its projection."""
    if "T5EncoderModel" in config.get("architectures", []):
        model = T5EncoderModel(T5Config.from_dict(config))
        del model.encoder.embed_tokens
        return model
    parsed = CLIPTextConfig.from_dict(config)
    model = CLIPTextModel(parsed)
    if "CLIPTextModelWithProjection" in config.get("architectures", []):
        model.text_projection = CLIPTextModelWithProjection(parsed).text_projection
    model.embeddings.position_ids = torch.arange(parsed.max_position_embeddings, device="cpu")[None]
    return model


def built(config: dict, classes: Mapping[str, str], where: object) -> dict[str, nn.Module]:
    """The networks of a checkpoint's config by name, as `network` makes them."""
    return {name: network(name, own, classes, where) for name, own in config["networks"].items()}


def network(name: str, config: dict, classes: Mapping[str, str], where: object) -> nn.Module:
    """One of the networks, as its config.json says: diffusers' of the `classes` that the family names, else a text encoder. Raises
    UserError where its class refuses it."""
    diffusers = library(where)
    with refusals(where, f"{name} is refused by {'diffusers' if name in classes else 'transformers'}", REMEDY):
        return getattr(diffusers, classes[name]).from_config(config) if name in classes else text_encoder(config)


def clip_part(name: str, encoder: nn.Module, *results: str) -> Part:
    """A text encoder's part; `results`: as Clip has them."""
    config = encoder.config
    width = config.projection_dim if hasattr(encoder, "text_projection") else config.hidden_size
    hidden = Port(("batch", config.max_position_embeddings, config.hidden_size))
    given = {result: Port(("batch", width)) if result == "text_embeds" else hidden for result in results}
    ids = {"input_ids": Port(("batch", config.max_position_embeddings), below=config.vocab_size)}
    return Part(name, GRAPH, Clip(name, encoder, results), ids, given)


def t5_part(name: str, encoder: nn.Module) -> Part:
    ids = {"input_ids": Port(("batch", "tokens"), below=encoder.config.vocab_size)}
    return Part(name, GRAPH, T5(name, encoder), ids, {"last_hidden_state": Port(("batch", "tokens", encoder.config.d_model))})


def autoencoder_parts(vae: nn.Module, upcast: bool = False) -> tuple[Part, Part]:
    """What makes pictures of latents, and what makes latents of pictures. `upcast`: whether the family's pipeline heeds the config's
    force_upcast, which stands in every config that diffusers writes."""
    config = vae.config
    wide = upcast and config.force_upcast
    sides = times(2 ** (len(config.block_out_channels) - 1))
    latents = {"latent_sample": Port(("batch", config.latent_channels, "height", "width"))}
    moments = {"latent_parameters": Port(("batch", 2 * config.latent_channels, "height", "width"))}
    given, made = ({"sample": Port(("batch", channels, *sides))} for channels in (config.in_channels, config.out_channels))
    return (
        Part("vae_decoder", GRAPH, LatentDecoder(vae), latents, made, wants_float32=wide),
        Part("vae_encoder", GRAPH, LatentEncoder(vae), given, moments, wants_float32=wide),
    )


def times(factor: int) -> tuple[str, str]:
    """Names of a picture's axes, from those of latents."""
    return ("height", "width") if factor == 1 else (f"{factor}*height", f"{factor}*width")


def divided(by: int) -> tuple[str, str]:
    return ("height", "width") if by == 1 else (f"height/{by}", f"width/{by}")


def renamed(name: str) -> str:
    """A published tensor's name, as the classes have it today."""
    for old, new in PUBLISHED.items():
        name = re.sub(old, new, name)
    return name


def library(where: object) -> ModuleType:
    """diffusers, which takes seconds to import and may not be installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(where, "needs diffusers, which is not installed", "pip install -r requirements.txt")
    import diffusers

    diffusers.logging.set_verbosity_error()
    return diffusers

"""Stable Diffusion 3 and 3.5: diffusers' and transformers' own classes.

Two of CLIP's text encoders, read before their last layer and at the end token, and T5's where there is one; a transformer over the
prompt's tokens and the picture's patches. encoder_hidden_states are CLIP's beside one another, as wide as T5's, then T5's;
pooled_projections both embeddings of the whole prompt.
"""

from torch import Tensor, nn

from suture.models.latent_diffusion import LatentDiffusion, autoencoder_parts, built, clip_part, renamed, t5_part
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("StableDiffusion3Pipeline",)
PREFIX = ""
NETWORKS, OPTIONAL = ("text_encoder", "text_encoder_2", "transformer", "vae"), ("text_encoder_3",)
CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}

__all__ = ["ARCHITECTURES", "NETWORKS", "OPTIONAL", "PREFIX", "build", "renamed"]


class StableDiffusion3(LatentDiffusion):
    def parts(self) -> tuple[Part, ...]:
        config = self.transformer.config
        texts = [
            clip_part(name, getattr(self, name), "hidden_states", "text_embeds") for name in ("text_encoder", "text_encoder_2")
        ]
        if hasattr(self, "text_encoder_3"):
            texts.append(t5_part("text_encoder_3", self.text_encoder_3))
        given = {
            "hidden_states": Port(("batch", config.in_channels, "height", "width")),
            "encoder_hidden_states": Port(("batch", "tokens", config.joint_attention_dim)),
            "pooled_projections": Port(("batch", config.pooled_projection_dim)),
            "timestep": Port(("batch",)),
        }
        denoised = {"out_sample": Port(("batch", self.transformer.out_channels, "height", "width"))}
        whole = {"height": config.patch_size, "width": config.patch_size}
        denoiser = Part("transformer", GRAPH, StableDiffusion3Denoiser(self.transformer), given, denoised, {}, whole)
        return (*texts, denoiser, *autoencoder_parts(self.vae))


class StableDiffusion3Denoiser(nn.Module):
    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """Latents [B,C,h,w], [B,T,hidden], [B,width] and the time from 1000 to 0 [B], to the velocity of the latents."""
        return self.transformer(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False)[0]


def build(config: dict, where: object) -> StableDiffusion3:
    return StableDiffusion3(config["networks"], built(config, CLASSES, where))

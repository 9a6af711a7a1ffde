"""FLUX.1: diffusers' and transformers' own classes.

CLIP's embedding of the whole prompt, T5's of its tokens; a transformer over the tokens and the picture's patches, 2x2 latents each,
whose places, three axes of them, are inputs; the decoder of the autoencoder, and its encoder.
"""

from torch import Tensor, nn

from suture.models.latent_diffusion import LatentDiffusion, autoencoder_parts, built, clip_part, renamed, t5_part
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("FluxPipeline",)
PREFIX = ""
NETWORKS, OPTIONAL = ("text_encoder", "text_encoder_2", "transformer", "vae"), ()
CLASSES = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}
GRID = 128  # places of a picture's patches along an axis, of 2048 pixels

__all__ = ["ARCHITECTURES", "NETWORKS", "OPTIONAL", "PREFIX", "build", "renamed"]


class Flux(LatentDiffusion):
    def parts(self) -> tuple[Part, ...]:
        config = self.transformer.config
        clip = clip_part("text_encoder", self.text_encoder, "text_embeds")
        t5 = t5_part("text_encoder_2", self.text_encoder_2)
        patches, axes = Port(("batch", "patches", config.in_channels)), len(config.axes_dims_rope)
        given = {
            "hidden_states": patches,
            "encoder_hidden_states": t5.outputs["last_hidden_state"],
            "pooled_projections": clip.outputs["text_embeds"],
            "timestep": Port(("batch",)),
            "img_ids": Port(("patches", axes), below=GRID),
            "txt_ids": Port(("tokens", axes), below=GRID),
        }
        if config.guidance_embeds:
            given["guidance"] = Port(("batch",))
        reads = {"encoder_hidden_states": "text_encoder_2/last_hidden_state", "pooled_projections": "text_encoder/text_embeds"}
        channels = config.patch_size**2 * (config.out_channels or config.in_channels)
        denoised = {"out_sample": Port(("batch", "patches", channels))}
        denoiser = Part("transformer", GRAPH, FluxDenoiser(self.transformer), given, denoised, reads)
        return (clip, t5, denoiser, *autoencoder_parts(self.vae))


class FluxDenoiser(nn.Module):
    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Patches [B,S,C], [B,T,hidden], [B,width], the time from 1 to 0 [B], int64 places [S,3] and [T,3] and, where the model was
        distilled, how far to move from what was not asked for [B], to the velocity of the patches [B,S,C]."""
        return self.transformer(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, return_dict=False
        )[0]


def build(config: dict, where: object) -> Flux:
    return Flux(config["networks"], built(config, CLASSES, where))

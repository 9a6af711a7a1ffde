"""Stable Diffusion XL: diffusers' and transformers' own classes.

Two text encoders, both read before their last layer, and the second's embedding of the whole prompt; a UNet that takes both, and
numbers that say how large the picture is and what was cut off. Where a picture's prompt goes on both sides, encoder_hidden_states are
the two encoders' results beside one another.
"""

from torch import Tensor, nn

from suture.models.latent_diffusion import LatentDiffusion, autoencoder_parts, built, clip_part, renamed
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("StableDiffusionXLPipeline",)
PREFIX = ""
NETWORKS, OPTIONAL = ("text_encoder", "text_encoder_2", "unet", "vae"), ()
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
SIZES = 6  # of a picture: original height and width, what was cut off above and on the left, height and width that are wanted

__all__ = ["ARCHITECTURES", "NETWORKS", "OPTIONAL", "PREFIX", "build", "renamed"]


class StableDiffusionXL(LatentDiffusion):
    def parts(self) -> tuple[Part, ...]:
        unet = self.unet.config
        first = clip_part("text_encoder", self.text_encoder, "hidden_states")
        second = clip_part("text_encoder_2", self.text_encoder_2, "hidden_states", "text_embeds")
        tokens = self.text_encoder.config.max_position_embeddings
        given = {
            "sample": Port(("batch", unet.in_channels, "height", "width")),
            "timestep": Port(("batch",), below=1000),
            "encoder_hidden_states": Port(("batch", tokens, unet.cross_attention_dim)),
            "text_embeds": second.outputs["text_embeds"],
            "time_ids": Port(("batch", SIZES), below=2048),
        }
        halved = 2 ** (len(unet.block_out_channels) - 1)
        denoised = {"out_sample": Port(("batch", unet.out_channels, "height", "width"))}
        reads, whole = {"text_embeds": "text_encoder_2/text_embeds"}, {"height": halved, "width": halved}
        denoiser = Part("unet", GRAPH, StableDiffusionXLDenoiser(self.unet), given, denoised, reads, whole)
        return (first, second, denoiser, *autoencoder_parts(self.vae, upcast=True))


class StableDiffusionXLDenoiser(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Latents [B,C,h,w], int64 [B], [B,T,hidden], [B,width] and int64 [B,6] in pixels, to the noise that is in the latents."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def build(config: dict, where: object) -> StableDiffusionXL:
    return StableDiffusionXL(config["networks"], built(config, CLASSES, where))

"""Stable Diffusion 1 and 2, with a ControlNet where there is one beside it: diffusers' and transformers' own classes.

The text encoder once for a prompt; at each denoising step the ControlNet and the UNet, which takes its residuals; the decoder of the
autoencoder once for the latents, and its encoder where there is a picture to begin with. A picture's sides are a multiple of the
latents', and these may have any that the UNet can halve as often as it does.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from suture.models.latent_diffusion import LatentDiffusion, autoencoder_parts, built, clip_part, divided, renamed, times
from suture.models.parts import GRAPH, Part, Port

ARCHITECTURES = ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline")
PREFIX = ""
NETWORKS, OPTIONAL = ("text_encoder", "unet", "vae"), ("controlnet",)
CLASSES = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel", "vae": "AutoencoderKL"}

__all__ = ["ARCHITECTURES", "NETWORKS", "OPTIONAL", "PREFIX", "build", "renamed"]


class StableDiffusion(LatentDiffusion):
    def parts(self) -> tuple[Part, ...]:
        unet = self.unet.config
        text = clip_part("text_encoder", self.text_encoder, "last_hidden_state")
        latents = Port(("batch", unet.in_channels, "height", "width"))
        step = {
            "sample": latents,
            "timestep": Port(("batch",), below=1000),
            "encoder_hidden_states": text.outputs["last_hidden_state"],
        }
        halved = 2 ** (len(unet.block_out_channels) - 1)
        whole = {"height": halved, "width": halved}
        told = {"encoder_hidden_states": "text_encoder/last_hidden_state"}
        parts, residuals = [text], {}
        if hasattr(self, "controlnet"):
            residuals = dict(_residuals(self.controlnet.config))
            hint = times(2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1))
            inputs = {**step, "controlnet_cond": Port(("batch", self.controlnet.config.conditioning_channels, *hint))}
            parts.append(Part("controlnet", GRAPH, Control(self.controlnet), inputs, residuals, told, whole))
        reads = {**told, **{name: f"controlnet/{name}" for name in residuals}}
        denoised = {"out_sample": Port(("batch", unet.out_channels, "height", "width"))}
        parts.append(Part("unet", GRAPH, Denoiser(self.unet), {**step, **residuals}, denoised, reads, whole))
        return (*parts, *autoencoder_parts(self.vae))


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


def _residuals(config) -> Iterator[tuple[str, Port]]:
    """A ControlNet's results: one for the first convolution, for each resnet and for each halving, and one for the middle."""
    layers, widths = config.layers_per_block, config.block_out_channels
    found = [(widths[0], 1)]
    for level, channels in enumerate(widths):
        found += [(channels, 2**level)] * layers
        if level < len(widths) - 1:
            found.append((channels, 2 ** (level + 1)))
    for number, (channels, by) in enumerate(found):
        yield f"down_block_res_sample_{number}", Port(("batch", channels, *divided(by)))
    yield "mid_block_res_sample", Port(("batch", widths[-1], *divided(2 ** (len(widths) - 1))))


def build(config: dict, where: object) -> StableDiffusion:
    return StableDiffusion(config["networks"], built(config, CLASSES, where))

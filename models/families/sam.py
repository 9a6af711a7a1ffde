"""SAM: an encoder, run once for a picture, and a decoder from points and boxes in it to masks; transformers' own modules.

A box is two points of kinds of their own, as in the graphs that segment-anything itself exports, so one decoder takes both:

    label     1                0                    2, 3                             -1
    a point   in the mask      beside the mask      the box's two corners            no point; one ends the points where there is no box
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from suture.core.errors import UserError
from suture.core.masks import DECODER, ENCODER, FEATURES, LABELS, MASKS, PIXELS, POINTS, SCORES
from suture.core.typed import Strict, check
from suture.models.config import check_config
from suture.models.parts import GRAPH, Part, Port
from suture.models.stepped import transformers_refusals

ARCHITECTURES = ("SamModel",)
PREFIX = ""
CONFIGS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
KINDS = 4  # of points, but for what is none


Few = Annotated[int, Field(ge=1, le=100)]
Size = Annotated[int, Field(ge=1, le=1 << 14)]


class SamPart(Strict):
    """What sizes follow from, in any of the three."""

    image_size: Size | None = None
    patch_size: Size | None = None
    window_size: Annotated[int, Field(ge=0, le=1 << 14)] | None = None
    output_channels: Size | None = None
    num_channels: Few | None = None
    mlp_dim: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    num_pos_feats: Size | None = None
    mask_input_channels: Size | None = None
    num_point_embeddings: Few | None = None
    num_multimask_outputs: Few | None = None
    attention_downsample_rate: Few | None = None
    iou_head_depth: Few | None = None
    iou_head_hidden_dim: Size | None = None
    global_attn_indexes: list[Annotated[int, Field(ge=0, le=1000)]] | None = None


class Sam(nn.Module):
    """All weights that the parts read, under the names that SamModel saves them by."""

    def __init__(
        self, config: SamConfig, encoder: nn.Module | None, positions: nn.Module, prompts: nn.Module, decoder: nn.Module
    ):
        super().__init__()
        self.config = config
        if encoder is not None:
            self.vision_encoder = encoder
        self.shared_image_embedding = positions
        self.prompt_encoder = prompts
        self.mask_decoder = decoder

    def parts(self) -> tuple[Part, Part]:
        """The encoder, once for a picture, then the decoder for each prompt; over the same parameters."""
        vision, masks = self.config.vision_config, self.config.mask_decoder_config
        grid = vision.image_size // vision.patch_size
        features = Port(("batch", vision.output_channels, grid, grid))
        decoder = MaskDecoder(self.config, None, self.shared_image_embedding, self.prompt_encoder, self.mask_decoder)
        pixels = {PIXELS: Port(("batch", vision.num_channels, vision.image_size, vision.image_size))}
        given = {FEATURES: features, POINTS: Port(("batch", "points", 2)), LABELS: Port(("batch", "points"), below=KINDS)}
        found = {
            MASKS: Port(("batch", masks.num_multimask_outputs, 4 * grid, 4 * grid)),
            SCORES: Port(("batch", masks.num_multimask_outputs)),
        }
        return (
            Part(ENCODER, GRAPH, ImageEncoder(self.vision_encoder).eval(), pixels, {FEATURES: features}),
            Part(DECODER, GRAPH, decoder.eval(), given, found, {FEATURES: f"{ENCODER}/{FEATURES}"}),
        )


class ImageEncoder(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.vision_encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, side, side], normalised, to [B, channels, side / patch, side / patch]."""
        return self.vision_encoder(pixel_values).last_hidden_state


class MaskDecoder(Sam):
    def forward(self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor) -> list[Tensor]:
        """Features [B, channels, h, w], points (x, y) in pixels of the encoder's picture [B, P, 2] and their kinds, int64 [B, P], to
        the logits of several masks [B, masks, 4 h, 4 w] and how good each is thought to be, as intersection over union [B, masks]."""
        prompts, dtype = self.prompt_encoder, image_embeddings.dtype
        batch, _, height, width = image_embeddings.shape
        kinds = torch.cat([each.weight for each in prompts.point_embed])
        labels = input_labels[:, None]
        points = self.shared_image_embedding((input_points[:, None] + 0.5) / prompts.input_image_size)
        points = torch.where((labels < 0)[..., None], prompts.not_a_point_embed.weight, points + kinds[labels.clamp(min=0)])
        none = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(batch, -1, height, width)
        masks, scores = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self._grid(height, width, dtype).expand(batch, -1, -1, -1),
            sparse_prompt_embeddings=points,
            dense_prompt_embeddings=none,
            multimask_output=True,
        )
        return [masks[:, 0], scores[:, 0]]

    def _grid(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The embedded centres of the picture's patches: [1, channels, height, width]."""
        y, x = ((torch.arange(size, dtype=torch.float32) + 0.5) / size for size in (height, width))
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).to(dtype)
        return self.shared_image_embedding(centres).permute(2, 0, 1)[None]


def build(config: dict, where: object) -> Sam:
    for name in CONFIGS:
        inner = config.get(name) or {}
        if not isinstance(inner, dict):
            raise UserError(where, f"its {name} is no object", "use the config.json that came with the weights")
        check_config(inner, f"{where}, {name}")
        check(inner, SamPart, f"{where}, {name}", "use the config.json that came with the weights")
    with transformers_refusals(where):
        parsed = SamConfig.from_dict({key: value for key, value in config.items() if key in CONFIGS})
        parsed._attn_implementation = "sdpa"
        model = SamModel(parsed)
    prompts = model.prompt_encoder
    del prompts.shared_embedding, prompts.mask_embed  # saved once, beside the encoders; masks are no prompts here
    return Sam(model.config, model.vision_encoder, model.shared_image_embedding, prompts, model.mask_decoder)

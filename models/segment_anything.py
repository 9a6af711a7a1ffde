"""The published single files of SAM, as segment-anything saves them: their names to transformers', their config.json from their shapes.

What shapes do not say is the same in all that were published: the mask decoder's heads.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from suture.core.refusals import BrokenFile

MARK = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"  # no other model's file has it
SHARED = "shared_image_embedding.positional_embedding"
LEFT_OUT = ("pixel_mean", "pixel_std")  # how pictures are normalised, which the preprocessor says
DECODER_HEADS = 8
MLP = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}  # of three layers
NAMES = (
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.([012])", lambda found: f"{found[1]}.{MLP[found[2]]}"),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"neck\.0\.", "neck.conv1."), (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."), (r"neck\.3\.", "neck.layer_norm2."),
    (r"output_upscaling\.0\.", "upscale_conv1."), (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."), (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."), (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"point_embeddings\.", "point_embed."),
    (r"\.norm", ".layer_norm"),
)  # fmt: skip


def is_published(weights: Mapping[str, Tensor]) -> bool:
    return MARK in weights


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that transformers' SamModel gives them."""
    return {_name(name): tensor for name, tensor in weights.items() if name not in LEFT_OUT}


def config(weights: Mapping[str, Tensor]) -> dict:
    """config.json of weights under their published names. Raises BrokenFile where one that says a size is not there, or no such one."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise BrokenFile(f"is named like SAM's, but {name} is missing or not of its rank")
        return shapes[name][axis]

    hidden, patch = (size("image_encoder.patch_embed.proj.weight", axis) for axis in (0, 2))
    grid = size("image_encoder.pos_embed", 1)
    layers = len({name for name in shapes if re.fullmatch(r"image_encoder\.blocks\.\d+\.attn\.rel_pos_h", name)})
    reach = [size(f"image_encoder.blocks.{layer}.attn.rel_pos_h", 0) for layer in range(layers)]
    windows = {(each + 1) // 2 for each in reach if each != 2 * grid - 1}
    if not layers or len(windows) > 1:
        raise BrokenFile("is named like SAM's, but its encoder's windows are not of one size")
    width = size("mask_decoder.iou_token.weight", 1)
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": hidden,
            "output_channels": size("image_encoder.neck.0.weight", 0),
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // size("image_encoder.blocks.0.attn.rel_pos_h", 1),
            "image_size": grid * patch,
            "patch_size": patch,
            "window_size": min(windows, default=grid),
            "global_attn_indexes": [layer for layer, each in enumerate(reach) if each == 2 * grid - 1],
            "mlp_dim": size("image_encoder.blocks.0.mlp.lin1.weight", 0),
            "num_pos_feats": size(MARK, 1),
        },
        "prompt_encoder_config": {
            "hidden_size": width,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": size("prompt_encoder.mask_downscaling.3.weight", 0),
        },
        "mask_decoder_config": {
            "hidden_size": width,
            "mlp_dim": size("mask_decoder.transformer.layers.0.mlp.lin1.weight", 0),
            "num_hidden_layers": len(
                {name.split(".")[3] for name in shapes if name.startswith("mask_decoder.transformer.layers.")}
            ),
            "num_attention_heads": DECODER_HEADS,
            "num_multimask_outputs": size("mask_decoder.mask_tokens.weight", 0) - 1,
            "iou_head_hidden_dim": size("mask_decoder.iou_prediction_head.layers.0.weight", 0),
        },
    }


def _name(name: str) -> str:
    if name == MARK:
        return SHARED
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name

"""A checkpoint in diffusers' folder layout, opened by its headers: model_index.json, and a folder for each of the model's networks.

    model_index.json      the pipeline's class, and the class of each network
    unet/                 config.json and diffusion_pytorch_model.safetensors, or its shards and their index
    text_encoder/         config.json and model.safetensors
    controlnet/           published apart from the rest; read where it lies, whether or not model_index.json names it

A tensor is called by its network and its own name, unet.conv_in.weight. Of networks that a family has no use for, such as a safety
checker, nothing is read.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.core.typed import Strict, read_typed
from suture.models.checkpoint import CONFIG, Checkpoint, read_weights

MODEL_INDEX = "model_index.json"
DIFFUSERS = "diffusion_pytorch_model"
WEIGHTS = [  # diffusers' names for a network's, and transformers'; float16 copies are published beside them
    (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json")
    for variant in ("", ".fp16")
    for stem in (DIFFUSERS, "model")
]
REMEDY = "use the one that came with the weights"

Widths = Annotated[list[Annotated[int, Field(ge=1, le=100_000)]], Field(min_length=1, max_length=16)]
Few = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]


class ModelIndex(Strict):
    class_name: Annotated[str, Field(alias="_class_name")]


class NetworkConfig(Strict):
    """What the size of a network follows from: large numbers would take the memory or the hours that they say."""

    block_out_channels: Widths | None = None
    conditioning_embedding_out_channels: Widths | None = None
    layers_per_block: Few | Annotated[list[Few], Field(max_length=16)] | None = None
    transformer_layers_per_block: Few | Annotated[list[Few | list[Few]], Field(max_length=16)] | None = None
    attention_head_dim: Width | Widths | None = None
    num_attention_heads: Width | Widths | None = None
    cross_attention_dim: Width | Widths | None = None
    in_channels: Width | None = None
    out_channels: Width | None = None
    latent_channels: Width | None = None
    norm_num_groups: Width | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Few | None = None
    num_layers: Few | None = None
    num_single_layers: Few | None = None
    num_heads: Width | None = None
    d_model: Width | None = None
    d_ff: Width | None = None
    d_kv: Width | None = None
    relative_attention_num_buckets: Width | None = None
    joint_attention_dim: Width | None = None
    caption_projection_dim: Width | None = None
    pooled_projection_dim: Width | None = None
    projection_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None
    addition_time_embed_dim: Width | None = None
    axes_dims_rope: Widths | None = None
    patch_size: Few | None = None
    pos_embed_max_size: Few | None = None
    max_position_embeddings: Width | None = None
    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    sample_size: Width | Annotated[list[Width], Field(max_length=2)] | None = None
    conditioning_channels: Width | None = None
    num_class_embeds: Width | None = None
    scaling_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    shift_factor: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None


def is_folder(folder: Path) -> bool:
    return os.path.lexists(folder / MODEL_INDEX)


def read_model_index(folder: Path) -> dict:
    """Raises UserError for a file that names no pipeline."""
    return read_typed(inside(folder, MODEL_INDEX), ModelIndex, REMEDY)


def open_folder(
    folder: Path, index: dict, needed: Collection[str], optional: Collection[str], renamed: Callable[[str], str]
) -> Checkpoint:
    """The `needed` networks of the pipeline and those of the `optional` that there are. `renamed`: a tensor's name as the network's
    class has it today. The checkpoint's config: the pipeline's class as its architecture and each network's config.json by name.

    Raises UserError where a network is missing, or a file is not what its name says."""
    networks = [*needed, *(name for name in optional if os.path.lexists(folder / name))]
    described, configs, tensors = [folder / MODEL_INDEX], {}, {}
    for name in networks:
        network = folder / name
        if not network.is_dir():
            raise UserError(folder, f"has no folder {name}, which its pipeline needs", "download all of the model's folder")
        config = inside(folder, f"{name}/{CONFIG}")
        configs[name] = read_typed(config, NetworkConfig, REMEDY)
        of_shards, found = read_weights(folder, [(f"{name}/{single}", f"{name}/{shards}") for single, shards in WEIGHTS])
        described += [config, *of_shards]
        tensors |= {renamed(f"{name}.{tensor}"): entry for tensor, entry in found.items()}
    config = {"architectures": [index["_class_name"]], "networks": configs}
    return Checkpoint(folder, config, tensors, tuple(described))

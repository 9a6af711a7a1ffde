"""Vision-language models that were published in pieces under LAVIS's names: a ViT-g, a Q-Former, what maps its queries to a LLaMA, and
the LLaMA itself in a folder of its own. What they compute is transformers' BLIP-2 or InstructBLIP.

    DIR/config.json
    DIR/*.safetensors       the pieces, each as `suture convert` makes it of its .pth or .bin
    DIR/llama/              the decoder's own folder: model.safetensors, or shards and their index

    visual_encoder.blocks.0.attn.qkv.weight   →  vision_model.encoder.layers.0.self_attn.qkv.weight
    visual_encoder.blocks.0.attn.{q,v}_bias   →  vision_model.encoder.layers.0.self_attn.qkv.bias = [q_bias, 0, v_bias]
    Qformer.bert.encoder.layer.0.…self.query  →  qformer.encoder.layer.0.…attention.query

A file of the ViT alone (eva_vit_g.pth) leaves "visual_encoder." out, a LLaMA's "llama_model."; names that are transformers' already stay.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from suture.core.errors import UserError
from suture.core.folders import inside
from suture.models.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    JoinedTensor,
    TensorEntry,
    Weights,
    of_library,
    read_header,
    read_weights,
)

LLAMA = "llama"
NAMES = (
    (r"^(?=(cls_token$|pos_embed$|patch_embed\.|blocks\.))", "visual_encoder."),
    (r"^(?=(model|lm_head)\.)", "llama_model."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.(.*attention)\.self\.", r"qformer.\1.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^llama_proj\.", "language_projection."),
    (r"^llama_model\.", "language_model."),
)


def read_pieces(folder: Path) -> Weights:
    """All tensors, by their names in their files; of a folder without the decoder's own, those that a library has written into one.
    Raises UserError where there are no pieces, or two have a tensor of one name."""
    if not (folder / LLAMA).exists() and any((folder / name).exists() for name in (SINGLE, INDEX)):
        return of_library(folder)
    pieces = [read_header(inside(folder, path.name)) for path in sorted(folder.glob("*.safetensors"))]
    if not pieces:
        remedy = "convert each published .pth or .bin: suture convert FILE DIR/NAME.safetensors"
        raise UserError(folder, "has no safetensors files", remedy)
    described, decoder = read_weights(folder / LLAMA, [(SINGLE, INDEX)])
    tensors: dict[str, TensorEntry] = {}
    for piece in (*pieces, decoder):
        for name in sorted(tensors.keys() & piece.keys()):
            raise UserError(piece[name].file, f"has a tensor {name}, as has {tensors[name].file.name}", "keep one of them")
        tensors |= piece
    return described, tensors


def with_known_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with transformers' names."""
    tensors = {transformers_name(name): entry for name, entry in checkpoint.tensors.items()}
    joined = {}
    for name in [name for name in tensors if name.endswith(".self_attn.q_bias")]:
        bias = name.removesuffix("q_bias") + "qkv.bias"
        query, value = tensors.pop(name), tensors.pop(name.removesuffix("q_bias") + "v_bias", None)
        if value is None or len(query.shape) != 1 or value.shape != query.shape:
            raise UserError(query.file, f"has {query.name}, and no v_bias of its shape", "download it again")
        tensors |= {query.name: query, value.name: value}
        load = partial(_query_and_value, checkpoint, query.name, value.name)
        joined[bias] = JoinedTensor(query.dtype, (3 * query.shape[0],), load)
    return replace(checkpoint, tensors=tensors, joined={**checkpoint.joined, **joined})


def transformers_name(name: str) -> str:
    for pattern, put in NAMES:
        name = re.sub(pattern, put, name)
    return name


def _query_and_value(checkpoint: Checkpoint, query: str, value: str) -> torch.Tensor:
    """Keys have no bias: it would add the same to all of a query's scores."""
    bias, other = checkpoint.load(query), checkpoint.load(value)
    return torch.cat([bias, torch.zeros_like(bias), other])

"""CPM-Bee: JSON in segments, a bias by distance within a segment and by the tree between segments. CPM-Bee-10B; of
this architecture is VisCPM's language part, too.

Written out from cpm_live/models/bee.py and cpm_live/layers of OpenBMB/CPM-Bee (`CPMBee.inference`); tensors have the names
that transformers' port gave them. Of the original is left out what its own generation never asks for: several samples in
one row, and logits for words that only the prompt knows (ext_table). It numbers the places of an answer from 0 again; here
they are counted on, which is the same: distances count within a segment alone, and an answer is a segment of its own.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from suture.models.config import required
from suture.models.cpm import CpmConfig, CpmEncoder, PositionBias, divided, places_of
from suture.models.dimensions import Dimensions
from suture.models.layers import rotate

ARCHITECTURES = ("CpmBeeForCausalLM", "CpmBee", "CPMBee")
PREFIX = "cpmbee."
DAMPING = 1.05
ROTARY_BASE = 10000


class CpmBeeModel(nn.Module):
    """Only holds the parameters that the checkpoint names cpmbee.*"""

    def __init__(self, config: CpmConfig, relations: int):
        super().__init__()
        self.encoder = CpmEncoder(config)
        self.input_embedding = nn.Embedding(config.vocab, config.hidden)
        self.position_bias = PositionBias(config, relations)


class CPMBee(nn.Module):
    """A decoder with its KV cache as arguments and results. Builds on any device, "meta" too."""

    def __init__(self, config: CpmConfig, relations: int, distance_scale: float):
        super().__init__()
        self.config, self.distance_scale = config, distance_scale
        self.cpmbee = CpmBeeModel(config, relations)

    @property
    def dimensions(self) -> Dimensions:
        return replace(self.config.dimensions, segmented=True)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        segment_ids: Tensor,
        segment_relations: Tensor,
        input_id_subs: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward, but that its tokens see each other. The last three arguments are those of
        suture.core.cpm_inputs. In place of token ids rows of the table of embeddings, [B,S,hidden], or what a picture has there."""
        places = places_of(attention_mask).clamp(min=0)
        segment, of_slots = looked_up(segment_ids, position_ids), looked_up(segment_ids, places)
        pairs = segment[:, :, None] * segment_relations.shape[1] + of_slots[:, None, :]
        relation = looked_up(segment_relations, pairs)
        bias = self.cpmbee.position_bias(position_ids, places, relation == 0, relation - 1)
        rows = input_ids if input_ids.is_floating_point() else self.cpmbee.input_embedding(input_ids)
        embedded = divided(rows, math.sqrt(self.config.hidden))
        x = subscripted(embedded, looked_up(input_id_subs, position_ids), self.distance_scale)
        x, presents = self.cpmbee.encoder(x, attention_mask, bias, past)
        x = divided(x, math.sqrt(self.config.hidden))
        return nn.functional.linear(x, self.cpmbee.input_embedding.weight), presents


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """table[b].flatten()[index[b]] for each row b: int64 in the index's shape."""
    flat = table.flatten(1)
    rows = torch.arange(flat.shape[0], device=flat.device).reshape(-1, *[1] * (index.dim() - 1))
    return flat.flatten()[rows * flat.shape[1] + index]


def subscripted(x: Tensor, subscripts: Tensor, distance_scale: float) -> Tensor:
    """The embedding [B,S,hidden] of a special token rotated by its subscript [B,S] (CpmBeeRotaryEmbedding): rotary
    positions with all of the embedding as one head."""
    width = x.shape[-1]
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = (subscripts * distance_scale).float()[:, :, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return rotate(x[:, None], angles.cos(), angles.sin())[:, 0]


def build(config: dict, where: object) -> CPMBee:
    relations = required(config, "position_bias_num_segment_buckets", where)
    return CPMBee(CpmConfig.read(config, where, scaled=True, damping=DAMPING), relations, config.get("distance_scale", 16))

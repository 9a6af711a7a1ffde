"""Lanes and the drivable area: a deformable transformer over the bird's-eye view, and masks from attention to its cells."""

import math

import torch
from torch import Tensor, nn

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import (
    Deformable,
    QueryLayer,
    QueryLayers,
    Wrapped,
    centres,
    inverse_sigmoid,
    of_one_query,
    perceptron,
)

RATIO = 4  # of a mask block's inner width


class MapTransformer(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, inner, heads = config.embed_dims, config.feedforward_channels, config.num_heads

        def deformable() -> Deformable:
            return Deformable(width, heads, config.map_levels, config.map_points)

        self.encoder = QueryLayers(*(QueryLayer(width, inner, deformable()) for _ in range(config.map_encoder_layers)))
        self.decoder = QueryLayers(
            *(QueryLayer(width, inner, Wrapped(width, heads), deformable()) for _ in range(config.map_decoder_layers))
        )
        self.level_embeds = nn.Parameter(torch.empty(4, width))
        self.reference_points = nn.Linear(width, 2)


class MaskScores(nn.Module):
    """How much each query attends to each cell, over all heads together: its mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.linear_l1 = nn.Sequential(nn.Linear(heads, heads), nn.ReLU())
        self.linear = nn.Sequential(nn.Linear(heads, 1), nn.ReLU())

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """[1,Q,C] and [1,cells,C] to [1,Q,cells]."""
        q, k = self.split(self.q(query)), self.split(self.k(memory))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return self.linear(self.linear_l1(scores.permute(0, 2, 3, 1)))[..., 0]


class Attended(MaskScores):
    """The same, of which only what is attended to is read."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor, value: Tensor) -> Tensor:
        q, k, v = self.split(self.q(query)), self.split(self.k(memory)), self.split(self.v(value))
        met = of_one_query(q, k, v) if query.shape[1] == 1 else nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(met.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # which alone attends to itself
            return self.proj(self.qkv(x)[..., -x.shape[-1] :])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MaskMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, RATIO * width), nn.Linear(RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, own: bool):
        super().__init__()
        self.own = own
        self.head_norm1, self.head_norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attended(width, heads), MaskMlp(width)
        if own:
            self.self_attention, self.norm3 = SelfAttention(width, heads), nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.own:
            x = self.norm3(x + self.self_attention(x))
        x = self.head_norm1(x + self.attn(x, memory, memory))
        return self.head_norm2(x + self.mlp(x))


class MaskHead(nn.Module):
    def __init__(self, config: DrivingConfig, layers: int, own: bool):
        super().__init__()
        width, heads = config.embed_dims, config.num_heads
        self.blocks = nn.ModuleList(Block(width, heads, own) for _ in range(layers))
        self.attnen = MaskScores(width, heads)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """To masks [1,Q,cells] and the queries as they have become."""
        for block in self.blocks:
            x = block(x if position is None else x + position, memory)
        return self.attnen(x if position is None else x + position, memory), x


class SegHead(nn.Module):
    """All weights, under their names; of some a graph reads nothing."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, kinds = config.embed_dims, config.num_things_classes
        layers = range(config.map_decoder_layers)
        self.bev_embedding = nn.Embedding(config.cells, width)
        self.transformer = MapTransformer(config)
        self.cls_branches = nn.ModuleList(nn.Linear(width, kinds) for _ in layers)
        self.reg_branches = nn.ModuleList(perceptron(width, width, width, 4) for _ in layers)
        self.query_embedding = nn.Embedding(config.map_queries, 2 * width)
        self.stuff_query = nn.Embedding(config.num_stuff_classes, 2 * width)
        self.reg_branches2 = nn.ModuleList(perceptron(width, width, width, 4) for _ in range(config.thing_layers))
        self.cls_thing_branches = nn.ModuleList(nn.Linear(width, kinds) for _ in range(config.thing_layers))
        self.cls_stuff_branches = nn.ModuleList(nn.Linear(width, 1) for _ in range(config.stuff_layers))
        self.things_mask_head = MaskHead(config, config.thing_layers, own=False)
        self.stuff_mask_head = MaskHead(config, config.stuff_layers, own=True)


class MapHead(nn.Module):
    """The part."""

    def __init__(self, config: DrivingConfig, seg_head: SegHead):
        super().__init__()
        self.config, self.seg_head = config, seg_head

    def forward(self, bev: Tensor) -> list[Tensor]:
        """[1,cells,C] to: lanes [1,queries,C]; of each the logits of its kinds [1,queries,kinds] and its box float32 [1,queries,4],
        (x, y, w, h) from 0 to 1; masks [1, queries + 1, H, W], at the end that of the area, of which the mask's score is [1,1].

        A mask depends on its query alone: all are made, where the published code sorts the hundred likeliest out before."""
        config, head = self.config, self.seg_head
        transformer, size = head.transformer, (config.bev_h, config.bev_w)
        positions = sines(*size, config.embed_dims)[None].to(bev.dtype) + transformer.level_embeds[0]
        places, memory = centres(*size)[None], bev
        for layer in transformer.encoder.layers:
            attention = layer.attentions[0]
            memory = layer.norms[0](memory + attention(memory + positions, memory, places, [size]))
            memory = layer.finished(memory)
        position, lanes = head.query_embedding.weight[None].split(config.embed_dims, -1)
        places = transformer.reference_points(position).float().sigmoid()
        for layer, regress in zip(transformer.decoder.layers, head.reg_branches):
            among, across = layer.attentions
            lanes = layer.norms[0](among(lanes + position, lanes + position, lanes, lanes))
            lanes = layer.norms[1](lanes + across(lanes + position, memory, places, [size]))
            lanes = layer.finished(lanes)
            moved, before = regress(lanes).float(), inverse_sigmoid(places)
            if before.shape[-1] == 2:  # the first has no boxes yet
                before = torch.cat([before, torch.zeros_like(before)], -1)
            places = (moved + before).sigmoid()
        area, area_position = head.stuff_query.weight[None].split(config.embed_dims, -1)
        masks, _ = head.things_mask_head(lanes, memory)
        area_mask, area = head.stuff_mask_head(area, memory, area_position)
        found = torch.cat([masks, area_mask], 1).unflatten(-1, size)
        return [lanes, head.cls_branches[-1](lanes), places, found, head.cls_stuff_branches[-1](area)[..., 0]]


def sines(height: int, width: int, channels: int) -> Tensor:
    """mmdet's SinePositionalEncoding, normalised, with an offset of -0.5: float32 [height · width, channels]."""
    bands = 10000 ** (2 * torch.arange(channels // 4, dtype=torch.float32, device="cpu") / (channels // 2))

    def along(side: int) -> Tensor:
        place = (torch.arange(side, dtype=torch.float32, device="cpu") + 0.5) / (side + 1e-6) * (2 * math.pi)
        turned = place[:, None] / bands
        return torch.stack([turned.sin(), turned.cos()], -1).flatten(1)

    y, x = along(height)[:, None].expand(-1, width, -1), along(width).expand(height, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)

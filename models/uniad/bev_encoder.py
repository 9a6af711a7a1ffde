"""BEVFormer's encoder: features of the cameras' pictures to cells of a bird's-eye view, with the view of the frame before.

Which cells a camera sees follows from its calibration alone. The published code gathers them for each camera, as many as there are;
here a camera has room for a fixed number, and what lies where is an input (suture.runtime.cameras makes it, and refuses a calibration
that needs more room). Where all cells have room it is the masked dense form.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import LEVELS, Deformable, QueryLayer, QueryLayers, Sizes, centres, sampled, scales

CAN_BUS = 18  # numbers of a vehicle's motion since the frame before
QUEUE = 2  # the view before, and this one


class TemporalAttention(nn.Module):
    """Of this view to itself and the one before; at the end the mean of both."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, self.heads, self.points = config.embed_dims, config.num_heads, config.temporal_points
        count = QUEUE * self.heads * self.points
        self.sampling_offsets = nn.Linear(QUEUE * width, 2 * count)
        self.attention_weights = nn.Linear(QUEUE * width, count)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, positions: Tensor, views: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
        """`query` [1,cells,C], `views` [2,cells,C], before and now, `places` float32 [1,cells,2]."""
        both = torch.cat([views[:1], query + positions], -1)
        shape = (self.heads, QUEUE, self.points)
        weights = self.attention_weights(both)[0].unflatten(-1, shape).softmax(-1)
        weights = weights.permute(2, 0, 1, 3)[:, :, :, None]
        moved = self.sampling_offsets(both)[0].float().unflatten(-1, (*shape, 2)).permute(2, 0, 1, 3, 4)[:, :, :, None]
        found = sampled(
            self.value_proj(views).unflatten(-1, (self.heads, -1)),
            places[:, :, None, None, None] + moved / scales([size]),
            weights,
            [size],
        )
        return query + self.output_proj(found.mean(0, keepdim=True))


class SpatialAttention(nn.Module):
    """Of the cells that each camera sees to its picture."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        self.pillar = config.num_points_in_pillar
        self.deformable_attention = Deformable(
            config.embed_dims, config.num_heads, LEVELS, config.spatial_points, projected=False
        )
        self.output_proj = nn.Linear(config.embed_dims, config.embed_dims)

    def forward(self, query: Tensor, features: Tensor, seen: tuple[Tensor, ...], sizes: Sizes) -> Tensor:
        """`query` [1,cells,C], `features` [cameras, pixels of all levels, C]; `seen` as BevEncoder takes it."""
        cells, points, places, shares = (each[0] for each in seen)
        cameras, count = cells.shape
        attention, width = self.deformable_attention, query.shape[-1]
        chosen = query[0].index_select(0, cells.flatten()).reshape(cameras, count, width)
        moved = attention.offsets(chosen) / scales(sizes)
        heights = points[:, :, None, None, None]  # points of a pillar take turns
        where = (heights + moved.unflatten(-2, (-1, self.pillar))).flatten(-3, -2)
        found = attention.attend(chosen, features, where, sizes).reshape(cameras * count, width)
        found = found.index_select(0, places.flatten()).reshape(*places.shape, width)
        return query + self.output_proj((found * shares[..., None]).sum(1)[None])


class BevPositions(nn.Module):
    """Learned, of columns and of rows."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        self.size = config.bev_h, config.bev_w
        half = config.embed_dims // 2
        self.row_embed, self.col_embed = nn.Embedding(config.bev_h, half), nn.Embedding(config.bev_w, half)

    def forward(self) -> Tensor:
        """[1,cells,C]"""
        height, width = self.size
        columns = self.col_embed.weight.expand(height, width, -1)
        return torch.cat([columns, self.row_embed.weight[:, None].expand(height, width, -1)], -1).flatten(0, 1)[None]


class CanBus(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(CAN_BUS, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.ReLU())
        self.add_module("norm", nn.LayerNorm(width))


def encoder(config: DrivingConfig) -> QueryLayers:
    width, inner = config.embed_dims, config.feedforward_channels
    return QueryLayers(
        *(QueryLayer(width, inner, TemporalAttention(config), SpatialAttention(config)) for _ in range(config.encoder_layers))
    )


class BevEncoder(nn.Module):
    """The part. `pts_bbox_head`: whose bev_embedding, positional_encoding and transformer it reads."""

    def __init__(self, config: DrivingConfig, pts_bbox_head: nn.Module):
        super().__init__()
        self.config, self.pts_bbox_head = config, pts_bbox_head

    def forward(
        self, level0: Tensor, level1: Tensor, level2: Tensor, level3: Tensor, can_bus: Tensor, previous_bev: Tensor,
        continues: Tensor, camera_cells: Tensor, camera_points: Tensor, cell_places: Tensor, cell_shares: Tensor,
    ) -> Tensor:  # fmt: skip
        """To the view [1,cells,C].

        level0 … level3   [1, cameras, C, h, w]: what backbone gives
        can_bus           float32 [1,18]: of the vehicle, how far it has come and turned since the frame before
        previous_bev      [1,cells,C]: what this part gave of the frame before
        continues         int64 [1]: 0 of a scene's first frame, which has none before it, else 1
        camera_cells      int64 [1,cameras,count]: the cells that a camera sees
        camera_points     float32 [1,cameras,count,heights,2]: where in its picture, (x, y) from 0 to 1
        cell_places       int64 [1,cells,overlap]: where among these, camera by camera, a cell is
        cell_shares       [1,cells,overlap]: 1 by the number of cameras that see it, or 0 where fewer see it
        """
        config, head = self.config, self.pts_bbox_head
        transformer, size, sizes = head.transformer, (config.bev_h, config.bev_w), config.level_sizes
        dtype, going = previous_bev.dtype, (continues > 0)[:, None, None]
        query = head.bev_embedding.weight[None] + transformer.can_bus_mlp(can_bus.to(dtype))[:, None]
        before = turned(previous_bev, can_bus[0, -1], size)
        positions = head.positional_encoding()
        places = centres(*size)[None] + self._shift(can_bus)
        features = []
        for level, each in enumerate((level0, level1, level2, level3)):
            flat = each[0].flatten(2).transpose(1, 2) + transformer.cams_embeds[:, None]
            features.append(flat + transformer.level_embeds[level])
        features, first = torch.cat(features, 1), query
        seen = camera_cells, camera_points, cell_places, cell_shares
        for layer in transformer.encoder.layers:
            temporal, spatial = layer.attentions
            views = torch.cat([torch.where(going, before, query), torch.where(going, first, query)])
            query = layer.norms[0](temporal(query, positions, views, places, size))
            query = layer.norms[1](spatial(query, features, seen, sizes))
            query = layer.finished(query)
        return query

    def _shift(self, can_bus: Tensor) -> Tensor:
        """float32 [1,1,2]: how far, of the view's width and height, the vehicle has come."""
        config, (x, y, angle) = self.config, (can_bus[:, each] for each in (0, 1, -2))
        wide, tall = (config.pc_range[axis + 3] - config.pc_range[axis] for axis in (0, 1))
        right = (torch.sin(angle) * x - torch.cos(angle) * y) / wide
        return torch.stack([right, (torch.cos(angle) * x + torch.sin(angle) * y) / tall], -1)[:, None]


def turned(view: Tensor, degrees: Tensor, size: tuple[int, int]) -> Tensor:
    """[1,cells,C], turned around its middle counter-clockwise, the nearest cell for each; zeros where none was."""
    height, width = size
    cells = view.transpose(1, 2).unflatten(-1, size)
    angle = degrees * (math.pi / 180)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    x, y = ((centres(*size) - 0.5) * torch.tensor([width, height], dtype=torch.float32, device="cpu")).unbind(-1)
    across, down = (cosine * x - sine * y) * (2 / width), (sine * x + cosine * y) * (2 / height)
    grid = torch.stack([across, down], -1).reshape(1, height, width, 2)
    found = F.grid_sample(cells.float(), grid, mode="nearest", align_corners=False)
    return found.flatten(2).transpose(1, 2).to(view.dtype)

"""Which cells each agent will cover: a state of the view, step after step, each made with what the agents' queries have become."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.core.driving import DrivingConfig
from suture.models.uniad.backbone import FrozenNorm
from suture.models.uniad.layers import QueryLayer, QueryLayers, Wrapped, fuser


def convolved(given: int, made: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(given, made, kernel, stride, kernel // 2, bias=False)


def normed(width: int) -> nn.Sequential:
    return nn.Sequential(FrozenNorm(width), nn.ReLU())


class Mlp(nn.Module):
    def __init__(self, given: int, inner: int, made: int, count: int):
        super().__init__()
        widths = [given, *[inner] * (count - 1), made]
        self.layers = nn.ModuleList(nn.Linear(*each) for each in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class ConvNorm(nn.Module):
    """mmcv's ConvModule with a norm and ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.bn = convolved(width, width, 3), FrozenNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Projection(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width = config.embed_dims
        convolutions = (ConvNorm(width) for _ in range(config.bev_proj_nlayers - 1))
        self.conv_layers = nn.Sequential(*convolutions, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_layers(x)


class Halving(nn.Module):
    """A bottleneck to half the height and width, rounded up."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 2
        self.layers = nn.ModuleDict(
            {
                "conv_down_project": convolved(width, inner, 1),
                "abn_down_project": normed(inner),
                "conv": convolved(inner, inner, 3, 2),
                "abn": normed(inner),
                "conv_up_project": convolved(inner, width, 1),
                "abn_up_project": normed(width),
            }
        )
        self.projection = nn.ModuleDict({"conv_skip_proj": convolved(width, width, 1), "bn_skip_proj": FrozenNorm(width)})

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        kept = F.max_pool2d(F.pad(x, (0, width % 2, 0, height % 2)), 2)
        for layer in self.layers.values():
            x = layer(x)
        for layer in self.projection.values():
            kept = layer(kept)
        return x + kept


class Doubling(nn.Module):
    """To twice the height and width, and what was there before added."""

    def __init__(self, width: int):
        super().__init__()
        self.upsample_layer = nn.ModuleDict({"1": convolved(width, width, 1), "2": FrozenNorm(width)})

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        x = F.interpolate(x, size=kept.shape[-2:], mode="bilinear", align_corners=False)
        for layer in self.upsample_layer.values():
            x = layer(x)
        return x + kept


class DecoderBlock(nn.Module):
    def __init__(self, width: int, last: bool):
        super().__init__()
        self.last = last
        inner = width // 2
        self.conv = nn.ModuleDict(
            {"1": convolved(width, inner, 3), "2": FrozenNorm(inner), "3": nn.ReLU(), "4": convolved(inner, width, 1), "5": FrozenNorm(width)}
        )  # fmt: skip
        self.up = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        size = [2 * side for side in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        for layer in self.conv.values():
            x = layer(x)
        x = x + F.interpolate(self.up(kept), size=size, mode="nearest")
        return x if self.last else x.relu()


class DenseDecoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderBlock(width, last) for last in (False, True))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, x)
        return y


class OccHead(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, steps = config.embed_dims, range(config.occ_n_future + 1)
        self.bev_light_proj = Projection(config)
        self.base_downscale = nn.Sequential(Halving(width), Halving(width))

        def layer() -> QueryLayer:
            attentions = Wrapped(width, config.num_heads), Wrapped(width, config.num_heads)
            return QueryLayer(width, config.occ_feedforward, *attentions)

        self.transformer_decoder = QueryLayers(*(layer() for _ in range(config.occ_layers)))
        self.transformer_decoder.post_norm = nn.LayerNorm(width)
        self.temporal_mlps = nn.ModuleList(Mlp(width, width, width, 2) for _ in steps)
        self.downscale_convs = nn.ModuleList(Halving(width) for _ in steps)
        self.upsample_adds = nn.ModuleList(Doubling(width) for _ in steps)
        self.dense_decoder = DenseDecoder(width)
        self.mode_fuser = fuser(width, width)
        self.multi_query_fuser = nn.Sequential(*fuser(3 * width, 2 * width), nn.Linear(2 * width, width))
        self.query_to_occ_feat, self.temporal_mlp_for_mask = (Mlp(width, width, width, 3) for _ in range(2))


class Occupancy(nn.Module):
    """The part."""

    def __init__(self, config: DrivingConfig, occ_head: OccHead):
        super().__init__()
        self.config, self.occ_head = config, occ_head
        self.grid = slicer(config)

    def forward(self, bev: Tensor, modes: Tensor, agents: Tensor, placed: Tensor, vehicles: Tensor) -> Tensor:
        """Of A agents, of which `vehicles` int64 [1,A] says which are looked for:

        bev                 [1,cells,C]
        modes               [1,A,modes,C], and
        placed              [1,A,C]: what `motion` made of each
        agents              [1,A,C]: what `track` did

        to logits [1, A, steps, H, W], the first of now, over the cells within `occ_bound` metres."""
        config, head = self.config, self.occ_head
        fused = head.mode_fuser(modes).amax(2)
        base = head.multi_query_fuser(torch.cat([fused, agents, placed], -1))
        cells = bev.transpose(1, 2).unflatten(-1, (config.bev_h, config.bev_w))
        view = F.grid_sample(cells.float(), self.grid, align_corners=True).to(bev.dtype)
        state = head.base_downscale(head.bev_light_proj(view))
        each = config.occ_layers // (config.occ_n_future + 1)
        states, asks, there = [], [], (vehicles > 0)[:, None]  # [1,1,A]
        for step in range(config.occ_n_future + 1):
            small, x = head.downscale_convs[step](state), head.temporal_mlps[step](base)
            flat = small.flatten(2).transpose(1, 2)  # [1,cells,C]
            asked = head.temporal_mlp_for_mask(x)
            asks.append(asked)
            near = ((flat.float() @ asked.float().transpose(1, 2)).sigmoid() >= config.attn_mask_thresh) & there
            seen = (near | (there & ~near.any(-1, keepdim=True)))[:, None]  # a cell that none is near sees all
            for layer in head.transformer_decoder.layers[step * each : (step + 1) * each]:
                among, across = layer.attentions
                flat = layer.norms[0](among(flat, flat, flat, flat))
                flat = layer.finished(layer.norms[1](across(flat, x, x, flat, seen)))
            state = head.upsample_adds[step](flat.transpose(1, 2).unflatten(-1, small.shape[-2:]), state)
            states.append(state)
        made = head.dense_decoder(torch.cat(states)).flatten(2)  # [steps,C,cells]
        asked = head.query_to_occ_feat(torch.cat(asks))  # [steps,A,C]
        return (asked @ made).transpose(0, 1)[None].unflatten(-1, (config.bev_h, config.bev_w))


def slicer(config: DrivingConfig) -> Tensor:
    """float32 [1,H,W,2]: where in the view the cells lie of one of `occ_bound` metres to each side and as many cells."""
    sides = []
    for axis, count in ((0, config.bev_w), (1, config.bev_h)):
        reach = (config.pc_range[axis + 3] - config.pc_range[axis]) / 2 * (count - 1) / count
        place = (torch.arange(count, dtype=torch.float32, device="cpu") + 0.5) / count * 2 - 1
        sides.append(place * config.occ_bound / reach)
    x, y = sides
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)[None]

"""What UniAD's transformers are made of, all batch first and as in evaluation: without dropout."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4  # of the pictures' features
Sizes = Sequence[tuple[int, int]]


def of_one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B,heads,1,D] over k and v [B,heads,K,D] as products and sums: TensorRT-RTX 1.7 builds no fused attention whose
    query is fixed to one, with two heads."""
    weights = ((k * q).sum(-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(-2)
    return (v * weights).sum(-2, keepdim=True)


class QueryAttention(nn.Module):
    """torch's MultiheadAttention, by its names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B,Q,C], [B,K,C] and [B,K,C] to [B,Q,C]. `seen`: bool, of [B,1,Q,K] or what spreads to it; true where a query sees a key."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, w, b in given)
        met = of_one_query(q, k, v) if q.shape[2] == 1 and seen is None else F.scaled_dot_product_attention(q, k, v, seen)
        return self.out_proj(met.transpose(1, 2).flatten(2))


class Wrapped(nn.Module):
    """mmcv's MultiheadAttention: torch's as `attn`; adds what it is given."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = QueryAttention(width, heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, identity: Tensor, seen: Tensor | None = None) -> Tensor:
        return identity + self.attn(query, key, value, seen)


class QueryFeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, inner), nn.ReLU()), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class QueryLayer(nn.Module):
    """mmcv's BaseTransformerLayer: attentions, each with a norm behind it, then a feed-forward network with one."""

    def __init__(self, width: int, inner: int, *attentions: nn.Module):
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.ffns = nn.ModuleList([QueryFeedForward(width, inner)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(attentions) + 1))

    def finished(self, x: Tensor) -> Tensor:
        return self.norms[-1](self.ffns[0](x))


class QueryLayers(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TorchLayer(nn.Module):
    """torch's TransformerEncoderLayer, or with a second attention its TransformerDecoderLayer, by their names."""

    def __init__(self, width: int, heads: int, inner: int, crossed: bool):
        super().__init__()
        self.crossed = crossed
        self.self_attn = QueryAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if crossed:
            self.multihead_attn = QueryAttention(width, heads)
            self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """`x` [B,Q,C]; `memory` [1,K,C], which all rows see alike, as far as `seen` [1,1,1,K] says."""
        x = self.norm1(x + self.self_attn(x, x, x))
        last = self.norm2
        if self.crossed:
            met = self.multihead_attn(x.flatten(0, 1)[None], memory, memory, seen)
            x = self.norm2(x + met.reshape(x.shape))
            last = self.norm3
        return last(x + self.linear2(self.linear1(x).relu()))


class Deformable(nn.Module):
    """Multi-scale deformable attention: mmcv's MultiScaleDeformableAttention, by its names."""

    def __init__(self, width: int, heads: int, levels: int, points: int, projected: bool = True):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        if projected:
            self.output_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, value: Tensor, places: Tensor, sizes: Sizes) -> Tensor:
        """`query` [B,Q,C], `value` [B, cells of all levels, C], `places` float32 from 0 to 1: points [B,Q,2] or boxes [B,Q,4], (x, y, w, h)."""
        moved = self.offsets(query)
        if places.shape[-1] == 2:
            moved = moved / scales(sizes)
        else:
            moved = moved / self.points * places[:, :, None, None, None, 2:] * 0.5
        return self.output_proj(self.attend(query, value, places[:, :, None, None, None, :2] + moved, sizes))

    def offsets(self, query: Tensor) -> Tensor:
        """float32 [B,Q,heads,levels,points,2], in cells."""
        return self.sampling_offsets(query).float().unflatten(-1, (self.heads, self.levels, self.points, 2))

    def attend(self, query: Tensor, value: Tensor, places: Tensor, sizes: Sizes) -> Tensor:
        """`places` float32 [B,Q,heads,levels,points,2], from 0 to 1. Not projected yet: [B,Q,C]."""
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        if self.levels > len(sizes):
            places, weights = (_as_the_kernel_reads(each, len(sizes)) for each in (places, weights))
        return sampled(self.value_proj(value).unflatten(-1, (self.heads, -1)), places, weights, sizes)


def sampled(value: Tensor, places: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """What lies at the places, weighted and summed. `value` [B,cells,heads,D], `places` float32 [B,Q,heads,levels,points,2] from 0 to
    1, `weights` [B,Q,heads,levels,points]; [B, Q, heads · D]. Sampling is float32: a float16 place is off by a part of a cell."""
    batch, _, heads, size = value.shape
    queries, points = places.shape[1], places.shape[4]
    summed, first = None, 0
    for level, (height, width) in enumerate(sizes):
        cells = value[:, first : first + height * width].permute(0, 2, 3, 1).reshape(batch * heads, size, height, width)
        grid = 2 * places[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        found = (F.grid_sample(cells.float(), grid, align_corners=False) * share.float()).sum(-1)
        summed = found if summed is None else summed + found
        first += height * width
    return summed.reshape(batch, heads * size, queries).transpose(1, 2).to(value.dtype)


def _as_the_kernel_reads(x: Tensor, levels: int) -> Tensor:
    """[B,Q,heads,more levels,...] to [B,Q,heads,levels,...]: mmcv's CUDA kernel takes the number of levels from the features, and the
    numbers one behind another, whatever number of levels they were made for."""
    batch, queries, heads, _, *rest = x.shape
    return x.reshape(batch, -1, levels, *rest)[:, : queries * heads].reshape(batch, queries, heads, levels, *rest)


def scales(sizes: Sizes) -> Tensor:
    """float32 [levels,1,2]: width and height."""
    return torch.tensor([[width, height] for height, width in sizes], dtype=torch.float32, device="cpu")[:, None]


def centres(height: int, width: int) -> Tensor:
    """float32 [height · width, 2]: (x, y) of cells' centres, from 0 to 1."""
    y, x = ((torch.arange(side, dtype=torch.float32, device="cpu") + 0.5) / side for side in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 2)


def inverse_sigmoid(x: Tensor, least: float = 1e-5) -> Tensor:
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=least) / (1 - x).clamp(min=least))


def waves(places: Tensor, width: int) -> Tensor:
    """float32 [..., 2], (x, y) from 0 to 1, to [..., 2 · width]: sines and cosines of y, then of x."""
    bands = 10000 ** (2 * torch.arange(width // 2, dtype=torch.float32, device="cpu") / width)
    turned = 2 * math.pi * places[..., None] / bands
    both = torch.stack([turned.sin(), turned.cos()], -1).flatten(-2)
    return torch.cat([both[..., 1, :], both[..., 0, :]], -1)


def perceptron(*widths: int, normed: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, before which there may be a norm."""
    modules: list[nn.Module] = []
    for given, made in pairwise(widths[:-1]):
        modules += [nn.Linear(given, made), *([nn.LayerNorm(made)] if normed else []), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(*widths[-2:]))


def fuser(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, made), nn.LayerNorm(made), nn.ReLU())

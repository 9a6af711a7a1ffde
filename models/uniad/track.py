"""Objects of a frame: a decoder over the bird's-eye view, whose queries are learned ones and the tracks of the frame before; and what
becomes of a track's query until the next frame. Which query is a track is suture.runtime.tracks' to say."""

import torch
from torch import Tensor, nn

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import Deformable, QueryAttention, QueryLayer, QueryLayers, Wrapped, inverse_sigmoid, perceptron

CODE = 10  # numbers of a box: x, y, log width, log length, z, log height, sine and cosine of its angle, velocity x and y


def decoder(config: DrivingConfig) -> QueryLayers:
    width, heads = config.embed_dims, config.num_heads

    def layer() -> QueryLayer:
        attentions = Wrapped(width, heads), Deformable(width, heads, 1, config.decoder_points)
        return QueryLayer(width, config.feedforward_channels, *attentions)

    return QueryLayers(*(layer() for _ in range(config.decoder_layers)))


def branches(config: DrivingConfig) -> dict[str, nn.ModuleList]:
    """What is read of a query behind each layer: its class, its box, where it was and will be."""
    width, layers = config.embed_dims, range(config.decoder_layers)
    steps = 2 * (config.past_steps + config.fut_steps)
    return {
        "cls_branches": nn.ModuleList(perceptron(width, width, width, config.num_classes, normed=True) for _ in layers),
        "reg_branches": nn.ModuleList(perceptron(width, width, width, CODE) for _ in layers),
        "past_traj_reg_branches": nn.ModuleList(perceptron(width, width, width, steps) for _ in layers),
    }


class Track(nn.Module):
    """The part."""

    def __init__(
        self, config: DrivingConfig, pts_bbox_head: nn.Module, query_embedding: nn.Embedding, reference_points: nn.Linear
    ):
        super().__init__()
        self.config, self.pts_bbox_head = config, pts_bbox_head
        self.query_embedding, self.reference_points = query_embedding, reference_points

    def forward(self, bev: Tensor, track_queries: Tensor, track_points: Tensor, track_active: Tensor) -> list[Tensor]:
        """Of the learned queries and, behind them, the tracks, Q in all:

        bev             [1,cells,C]
        track_queries   [1,tracks,2C]: position and feature
        track_points    float32 [1,tracks,2]: where each is now, (x, y) as a logit of the view's width and height
        track_active    int64 [1,tracks]: 1, or 0 of a place that holds no track

        to their queries [1,Q,2C], logits [1,Q,classes], boxes float32 [1,Q,10], moves [1,Q,past + future,2], embeddings [1,Q,C] and
        points float32 [1,Q,3].
        """
        config, head = self.config, self.pts_bbox_head
        queries = torch.cat([self.query_embedding.weight[None], track_queries], 1)
        position, x = queries.split(config.embed_dims, -1)
        points = self.reference_points(position).float()
        learned = config.num_query + 1
        carried = torch.cat([track_points, points[:, learned:, 2:]], -1)
        points = torch.cat([points[:, :learned], carried], 1).sigmoid()
        active = torch.cat([torch.ones_like(track_active[:, :1]).expand(-1, learned), track_active], 1)
        seen = (active > 0)[:, None, None]
        size = [(config.bev_h, config.bev_w)]
        for layer, regress in zip(head.transformer.decoder.layers, head.reg_branches):
            among, across = layer.attentions
            x = layer.norms[0](among(x + position, x + position, x, x, seen))
            x = layer.norms[1](x + across(x + position, bev, points[..., :2], size))
            x = layer.finished(x)
            found = regress(x).float()
            moved = torch.cat([found[..., :2], found[..., 4:5]], -1)
            points = (moved + inverse_sigmoid(points)).sigmoid()
        low, high = (torch.tensor(config.pc_range, device="cpu")[each] for each in (slice(0, 3), slice(3, 6)))
        place = points * (high - low) + low
        boxes = torch.cat([place[..., :2], found[..., 2:4], place[..., 2:], found[..., 5:]], -1)
        moves = head.past_traj_reg_branches[-1](x).unflatten(-1, (-1, 2))
        return [queries, head.cls_branches[-1](x), boxes, moves, x, inverse_sigmoid(points)]


class MemoryBank(nn.Module):
    """Of each track, what it was in some frames before."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width = config.embed_dims
        self.save_proj = nn.Linear(width, width)
        self.temporal_attn = QueryAttention(width, config.num_heads)
        self.temporal_fc1, self.temporal_fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.temporal_norm1, self.temporal_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, remembered: Tensor, saves: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [1,tracks,C], `memory` [1,tracks,frames,C], `remembered` int64 [1,tracks,frames], `saves` int64 [1,tracks]: both after."""
        rows, before = x.transpose(0, 1), memory[0]  # each track attends to its own
        met = self.temporal_attn(rows, before, before, (remembered[0] > 0)[:, None, None])
        rows = self.temporal_norm1(rows + met)
        rows = self.temporal_norm2(rows + self.temporal_fc2(self.temporal_fc1(rows).relu()))
        x = torch.where((remembered[..., -1:] > 0), rows.transpose(0, 1), x)
        shifted = torch.cat([memory[:, :, 1:], self.save_proj(x)[:, :, None]], 2)
        return x, torch.where((saves > 0)[..., None, None], shifted, memory)


class QueryInteraction(nn.Module):
    """Tracks to each other, and what their queries become."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width = config.embed_dims
        self.self_attn = QueryAttention(width, config.num_heads)
        for name in ("linear1", "linear2", "linear_pos1", "linear_pos2", "linear_feat1", "linear_feat2"):
            self.add_module(name, nn.Linear(width, width))
        for name in ("norm_pos", "norm_feat", "norm1", "norm2"):
            self.add_module(name, nn.LayerNorm(width))

    def forward(self, x: Tensor, queries: Tensor, active: Tensor) -> Tensor:
        """`x` [1,tracks,C], `queries` [1,tracks,2C], `active` int64 [1,tracks]."""
        position, feature = queries.chunk(2, -1)
        seen = (active > 0)[:, None, None]
        x = self.norm1(x + self.self_attn(position + x, position + x, x, seen))
        x = self.norm2(x + self.linear2(self.linear1(x).relu()))
        position = self.norm_pos(position + self.linear_pos2(self.linear_pos1(x).relu()))
        feature = self.norm_feat(feature + self.linear_feat2(self.linear_feat1(x).relu()))
        return torch.cat([position, feature], -1)


class Interact(nn.Module):
    """The part."""

    def __init__(self, memory_bank: MemoryBank, query_interact: QueryInteraction):
        super().__init__()
        self.memory_bank, self.query_interact = memory_bank, query_interact

    def forward(
        self, embeddings: Tensor, queries: Tensor, memory: Tensor, remembered: Tensor, saves: Tensor, active: Tensor
    ) -> list[Tensor]:
        """Of a frame's tracks:

        embeddings   [1,tracks,C]: what `track` made of each
        queries      [1,tracks,2C]: with which it was asked
        memory       [1,tracks,frames,C], and of each frame whether it is `remembered`, int64 [1,tracks,frames], the last one latest
        saves        int64 [1,tracks]: whether this frame is to be remembered
        active       int64 [1,tracks]

        to the next frame's queries and memory.
        """
        x, memory = self.memory_bank(embeddings, memory, remembered, saves)
        return [self.query_interact(x, queries, active), memory]

"""Where the vehicle itself shall go: a query of what is said of it, and of what the driver is told, over the bird's-eye view."""

import torch
from torch import Tensor, nn

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import QueryLayers, TorchLayer, fuser, perceptron

COMMANDS = 3  # right, left, straight on
ADAPTERS = 3


class PlanningHead(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, steps = config.embed_dims, config.planning_steps
        self.navi_embed, self.pos_embed = nn.Embedding(COMMANDS, width), nn.Embedding(1, width)
        self.reg_branch = perceptron(width, width, 2 * steps)
        self.attn_module = QueryLayers(
            *(TorchLayer(width, config.num_heads, 2 * width, crossed=True) for _ in range(config.planning_layers))
        )
        self.mlp_fuser = fuser(3 * width, width)
        self.bev_adapter = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(width // 2, width, 1))
                for _ in range(ADAPTERS)
            )
        )


class Planning(nn.Module):
    """The part. `positional_encoding`: pts_bbox_head's."""

    def __init__(self, config: DrivingConfig, planning_head: PlanningHead, positional_encoding: nn.Module):
        super().__init__()
        self.config, self.planning_head = config, planning_head
        self.pts_bbox_head = nn.Module()
        self.pts_bbox_head.positional_encoding = positional_encoding

    def forward(self, bev: Tensor, modes: Tensor, agents: Tensor, command: Tensor) -> Tensor:
        """[1,cells,C], `modes` [1,A,modes,C] and `agents` [1,A,C], of which the last one is the vehicle, and int64 [1], to the plan
        float32 [1,steps,2], in metres. The published code then moves it away from what will be occupied, by an optimizer."""
        config, head = self.config, self.planning_head
        ego = modes[:, -1]
        told = head.navi_embed.weight[command][:, None].expand(ego.shape)
        query = head.mlp_fuser(torch.cat([ego, agents[:, -1:].expand(ego.shape), told], -1)).amax(1, keepdim=True)
        view = (bev + self.pts_bbox_head.positional_encoding()).transpose(1, 2)
        view = view.unflatten(-1, (config.bev_h, config.bev_w))
        view = (view + head.bev_adapter(view)).flatten(2).transpose(1, 2)
        query = query + head.pos_embed.weight
        for layer in head.attn_module.layers:
            query = layer(query, view)
        return head.reg_branch(query).float().unflatten(-1, (-1, 2))[:, 0].cumsum(1)

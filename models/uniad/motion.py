"""Where each agent may go: a decoder over agents, lanes and the bird's-eye view, of some modes each, from anchors of its class."""

import torch
from torch import Tensor, nn

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import QueryLayer, TorchLayer, fuser, perceptron, sampled, scales, waves

GAUSSIAN = 5  # numbers of a step: where, x and y, and how sure: two deviations and a correlation
HALF_TURN = 3.1415953  # as the published code has it


class Interaction(nn.Module):
    def __init__(self, config: DrivingConfig, crossed: bool):
        super().__init__()
        width = config.embed_dims
        self.interaction_transformer = TorchLayer(width, config.num_heads, 2 * width, crossed)

    def forward(self, x: Tensor, memory: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """`x` [agents,modes,C], `memory` [1,keys,C]."""
        return self.interaction_transformer(x, memory, seen)


class MotionAttention(nn.Module):
    """Of each mode to the view around where its trajectory ends, some points a step."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, self.heads = config.embed_dims, config.num_heads
        self.steps, self.points = config.predict_steps, config.motion_points
        self.size, self.range = (config.bev_h, config.bev_w), config.pc_range
        count = self.heads * self.steps * self.points
        self.sampling_offsets, self.attention_weights = nn.Linear(width, 2 * count), nn.Linear(width, count)
        self.value_proj, self.output_proj = nn.Linear(width, width), fuser(self.steps * width, width)

    def forward(self, x: Tensor, positions: Tensor, view: Tensor, ends: Tensor) -> Tensor:
        """`x` and `positions` [agents,modes,C], `view` [1,cells,C], `ends` float32 [agents,modes,2], in metres."""
        query, (agents, modes, width) = x + positions, x.shape
        shape = (self.heads, self.steps, self.points)
        weights = self.attention_weights(query).unflatten(-1, shape).softmax(-1)
        moved = self.sampling_offsets(query).float().unflatten(-1, (*shape, 2)) / scales([self.size])[0]
        places = normalised(ends, self.range)[:, :, None, None, None] + moved
        weights, places = (  # of each step's queries: [1, agents · modes · steps, heads, 1, points, ...]
            each.transpose(2, 3).reshape(1, agents * modes * self.steps, self.heads, 1, *each.shape[4:])
            for each in (weights, places)
        )
        value = self.value_proj(view).unflatten(-1, (self.heads, -1))
        found = sampled(value, places, weights, [self.size])
        return x + self.output_proj(found.reshape(agents, modes, self.steps * width))


class MotionFormer(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, inner, layers = config.embed_dims, config.feedforward_channels, range(config.motion_layers)
        self.intention_interaction_layers = Interaction(config, crossed=False)
        self.track_agent_interaction_layers = nn.ModuleList(Interaction(config, crossed=True) for _ in layers)
        self.map_interaction_layers = nn.ModuleList(Interaction(config, crossed=True) for _ in layers)
        self.bev_interaction_layers = nn.ModuleList(QueryLayer(width, inner, MotionAttention(config)) for _ in layers)
        self.static_dynamic_fuser = perceptron(2 * width, 2 * width, width)
        self.dynamic_embed_fuser = perceptron(3 * width, 2 * width, width)
        self.in_query_fuser = perceptron(2 * width, 2 * width, width)
        self.out_query_fuser = perceptron(4 * width, 2 * width, width)


class MotionHead(nn.Module):
    """All weights, under their names, and the anchors, which the published code reads from a file of their own."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, groups, layers = config.embed_dims, len(config.group_id_list), range(config.motion_layers)
        self.kmeans_anchors = nn.Parameter(torch.empty(groups, config.predict_modes, config.predict_steps, 2))
        self.learnable_motion_query_embedding = nn.Embedding(config.predict_modes * groups, width)
        self.motionformer = MotionFormer(config)
        self.layer_track_query_fuser = fuser(width * config.decoder_layers, width)
        for name in ("agent_level", "scene_level_ego", "scene_level_offset", "boxes_query"):
            self.add_module(f"{name}_embedding_layer", perceptron(width, 2 * width, width))
        self.traj_cls_branches = nn.ModuleList(perceptron(width, width, width, 1, normed=True) for _ in layers)
        steps = config.predict_steps * GAUSSIAN
        self.traj_reg_branches = nn.ModuleList(perceptron(width, width, width, steps) for _ in layers)


class Motion(nn.Module):
    """The part."""

    def __init__(self, config: DrivingConfig, motion_head: MotionHead, lane_positions: nn.Embedding):
        super().__init__()
        self.config, self.motion_head = config, motion_head
        self.seg_head = nn.Module()
        self.seg_head.query_embedding = lane_positions
        found = {label: group for group, labels in enumerate(config.group_id_list) for label in labels}
        self.groups = [found.get(label, 0) for label in range(config.num_classes)]

    def forward(
        self, bev: Tensor, agents: Tensor, agent_places: Tensor, agent_labels: Tensor, agent_active: Tensor, lanes: Tensor
    ) -> list[Tensor]:
        """Of A agents, of which the last one is the vehicle itself:

        bev            [1,cells,C]
        agents         [1,A,C]: what `track` made of each
        agent_places   float32 [1,A,3]: x and y in metres and the angle of each
        agent_labels   int64 [1,A]: their classes
        agent_active   int64 [1,A]: 1, or 0 of a place that holds none
        lanes          [1,lanes,C]: what `map` made

        to trajectories float32 [1,A,modes,steps,5], logarithms of how likely each is [1,A,modes], what each mode has become
        [1,A,modes,C] and positions [1,A,C].
        """
        config, head, dtype = self.config, self.motion_head, bev.dtype
        former, width, modes = head.motionformer, config.embed_dims, config.predict_modes
        track, place, angle = agents[0], agent_places[0, :, None, None, :2], agent_places[0, :, 2]
        position = self._embedded("boxes_query", agent_places[0, :, :2], dtype)
        group = torch.tensor(self.groups, device="cpu")[agent_labels[0]]
        anchors = head.kmeans_anchors.float()[group]  # [A,modes,steps,2]
        spread = rotated(anchors, angle - HALF_TURN)
        learned = head.learnable_motion_query_embedding.weight.unflatten(0, (-1, modes))[group]
        own = former.intention_interaction_layers(self._embedded("agent_level", anchors[..., -1, :], dtype))
        ego = self._embedded("scene_level_ego", (place + spread)[..., -1, :], dtype)
        offset = self._embedded("scene_level_offset", spread[..., -1, :], dtype)
        static, trajectories, x = own + offset + learned, spread, torch.zeros_like(learned)
        tracks, positions = (each[:, None].expand(-1, modes, -1) for each in (track, position))
        lane_keys = lanes + self.seg_head.query_embedding.weight[None, :, :width]
        agent_keys, seen = (track + position)[None], (agent_active > 0)[:, None, None]
        for layer in range(config.motion_layers):
            dynamic = former.dynamic_embed_fuser(torch.cat([own, offset, ego], -1))
            intention = former.static_dynamic_fuser(torch.cat([static, dynamic], -1))
            x = former.in_query_fuser(torch.cat([x, intention], -1))
            asked = x + positions
            by_agents = former.track_agent_interaction_layers[layer](asked, agent_keys, seen)
            by_lanes = former.map_interaction_layers[layer](asked, lane_keys)
            block = former.bev_interaction_layers[layer]
            ends = (place + trajectories)[..., -1, :]
            by_view = block.finished(block.norms[0](block.attentions[0](x, positions, bev, ends)))
            x = former.out_query_fuser(torch.cat([by_agents, by_lanes, by_view, tracks + positions], -1))
            steps = head.traj_reg_branches[layer](x).float().unflatten(-1, (-1, GAUSSIAN))
            trajectories = steps[..., :2].cumsum(-2)
            own = self._embedded("agent_level", rotated(trajectories, HALF_TURN - angle)[..., -1, :], dtype)
            ego = self._embedded("scene_level_ego", (place + trajectories)[..., -1, :], dtype)
            offset = self._embedded("scene_level_offset", trajectories[..., -1, :], dtype)
        sure = torch.cat([trajectories, steps[..., 2:4].exp(), steps[..., 4:].tanh()], -1)
        likely = head.traj_cls_branches[-1](x)[..., 0].float().log_softmax(-1).to(dtype)
        return [sure[None], likely[None], x[None], position[None]]

    def _embedded(self, name: str, places: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [..., 2] in metres to [..., C]."""
        waved = waves(normalised(places, self.config.pc_range), self.config.embed_dims // 2)
        return self.motion_head.get_submodule(f"{name}_embedding_layer")(waved.to(dtype))


def normalised(places: Tensor, span: list[float]) -> Tensor:
    """(x, y) in metres to 0 to 1 within the view."""
    low, high = torch.tensor([span[:2], span[3:5]], device="cpu")
    return (places - low) / (high - low)


def rotated(steps: Tensor, angle: Tensor) -> Tensor:
    """float32 [A,modes,steps,2] by [A], counter-clockwise."""
    sine, cosine = (each[:, None, None] for each in (torch.sin(angle), torch.cos(angle)))
    x, y = steps.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)

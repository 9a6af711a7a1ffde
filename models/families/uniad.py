"""UniAD: pictures of the cameras around a vehicle to objects, lanes, where each will go, what will be occupied, and a plan.

    backbone      pictures                                      →  features at four scales
    bev_encoder   features, the view of the frame before        →  a bird's-eye view
    track         the view, the tracks of the frame before      →  objects, of each a query and a box
    interact      what became of the tracks                     →  their queries and memory for the frame after
    map           the view                                      →  lanes and the drivable area
    motion        the view, objects, lanes                      →  trajectories
    occupancy     the view, objects and their trajectories      →  which cells each will cover
    planning      the view, what the vehicle itself may do      →  a plan

Networks and names are those of OpenDriveLab/UniAD. What the published code keeps between frames, the view and the tracks, goes in and
comes out, and what it makes as many of as there are (tracks, cells that a camera sees) has a fixed number of places
(suture.runtime.driving calls the parts in turn).
"""

from pathlib import Path

from torch import nn

from suture.core.driving import BACKBONE, BEV_ENCODER, INTERACT, MAP, MOTION, OCCUPANCY, PLANNING, REMEDY, TRACK, DrivingConfig
from suture.core.errors import UserError
from suture.core.typed import check
from suture.models.parts import GRAPH, Part, Port
from suture.models.uniad import backbone, bev_encoder, map_head, motion, occupancy, planning, track

ARCHITECTURES = ("UniAD",)
PREFIX = ""


class BevTransformer(nn.Module):
    """Of bird's-eye view and tracks together, as their weights' names have it."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        width = config.embed_dims
        self.level_embeds = nn.Parameter(nn.Linear(width, bev_encoder.LEVELS).weight)
        self.cams_embeds = nn.Parameter(nn.Linear(width, config.cameras).weight)
        self.can_bus_mlp = bev_encoder.CanBus(width)
        self.encoder, self.decoder = bev_encoder.encoder(config), track.decoder(config)


class TrackHead(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        self.bev_embedding = nn.Embedding(config.cells, config.embed_dims)
        self.positional_encoding = bev_encoder.BevPositions(config)
        self.transformer = BevTransformer(config)
        for name, branches in track.branches(config).items():
            self.add_module(name, branches)


class UniAD(nn.Module):
    """All weights that the parts read, under the names that they were published by."""

    def __init__(self, config: DrivingConfig):
        super().__init__()
        self.config, width = config, config.embed_dims
        self.img_backbone, self.img_neck = backbone.ResNet(config), backbone.Pyramid(config)
        self.pts_bbox_head = TrackHead(config)
        self.query_embedding = nn.Embedding(config.num_query + 1, 2 * width)
        self.reference_points = nn.Linear(width, 3)
        self.memory_bank, self.query_interact = track.MemoryBank(config), track.QueryInteraction(config)
        self.seg_head = map_head.SegHead(config)
        self.motion_head = motion.MotionHead(config)
        self.occ_head = occupancy.OccHead(config)
        self.planning_head = planning.PlanningHead(config)

    def parts(self) -> tuple[Part, ...]:
        config, head = self.config, self.pts_bbox_head
        width, cells, agents = config.embed_dims, config.cells, config.agents
        view = Port((1, cells, width))
        tracks, carried = (1, config.tracks), 1 + config.num_query + config.tracks
        modes = Port((1, agents, config.predict_modes, width))
        of_agents, flags = Port((1, agents, width)), Port((1, agents), below=2)
        lanes = Port((1, config.map_queries, width))
        levels = {f"level{level}": Port((1, config.cameras, width, *size)) for level, size in enumerate(config.level_sizes)}
        room = (1, config.cameras, config.camera_queries)
        picture = Port((1, config.cameras, 3, config.height, config.width))
        seen = {
            "camera_cells": Port(room, below=cells),
            "camera_points": Port((*room, config.num_points_in_pillar, 2), exact=True),
            "cell_places": Port((1, cells, config.camera_overlap), below=config.cameras * config.camera_queries),
            "cell_shares": Port((1, cells, config.camera_overlap)),
        }
        state = {"can_bus": Port((1, bev_encoder.CAN_BUS), exact=True), "previous_bev": view, "continues": Port((1,), below=2)}
        memory = Port((*tracks, config.memory_bank_len, width))
        points = {
            "track_queries": Port((*tracks, 2 * width)),
            "track_points": Port((*tracks, 2), exact=True),
            "track_active": Port(tracks, below=2),
        }
        objects = {
            "queries": Port((1, carried, 2 * width)),
            "logits": Port((1, carried, config.num_classes)),
            "boxes": Port((1, carried, track.CODE), exact=True),
            "moves": Port((1, carried, config.past_steps + config.fut_steps, 2)),
            "embeddings": Port((1, carried, width)),
            "points": Port((1, carried, 3), exact=True),
        }
        kept = {
            "embeddings": Port((*tracks, width)),
            "queries": Port((*tracks, 2 * width)),
            "memory": memory,
            "remembered": Port((*tracks, config.memory_bank_len), below=2),
            "saves": Port(tracks, below=2),
            "active": Port(tracks, below=2),
        }
        drawn = {
            "lanes": lanes,
            "lane_logits": Port((1, config.map_queries, config.num_things_classes)),
            "lane_boxes": Port((1, config.map_queries, 4), exact=True),
            "masks": Port((1, config.map_queries + config.num_stuff_classes, config.bev_h, config.bev_w)),
            "area_logits": Port((1, config.num_stuff_classes)),
        }
        moving = {
            "bev": view,
            "agents": of_agents,
            "agent_places": Port((1, agents, 3), exact=True),
            "agent_labels": Port((1, agents), below=config.num_classes),
            "agent_active": flags,
            "lanes": lanes,
        }
        going = {
            "trajectories": Port((1, agents, config.predict_modes, config.predict_steps, motion.GAUSSIAN), exact=True),
            "likely": Port((1, agents, config.predict_modes)),
            "modes": modes,
            "placed": of_agents,
        }
        covered = {"bev": view, "modes": modes, "agents": of_agents, "placed": of_agents, "vehicles": flags}
        steered = {"bev": view, "modes": modes, "agents": of_agents, "command": Port((1,), below=planning.COMMANDS)}
        logits = Port((1, agents, config.occ_n_future + 1, config.bev_h, config.bev_w))
        seg, decide, bev = self.seg_head, self.planning_head, {"bev": f"{BEV_ENCODER}/bev"}
        modules = {
            BACKBONE: backbone.Backbone(self.img_backbone, self.img_neck),
            BEV_ENCODER: bev_encoder.BevEncoder(config, head),
            TRACK: track.Track(config, head, self.query_embedding, self.reference_points),
            INTERACT: track.Interact(self.memory_bank, self.query_interact),
            MAP: map_head.MapHead(config, seg),
            MOTION: motion.Motion(config, self.motion_head, seg.query_embedding),
            OCCUPANCY: occupancy.Occupancy(config, self.occ_head),
            PLANNING: planning.Planning(config, decide, head.positional_encoding),
        }
        said = {"modes": f"{MOTION}/modes"}
        ends = {
            BACKBONE: ({"pictures": picture}, levels, {}),
            BEV_ENCODER: (levels | state | seen, {"bev": view}, {name: f"{BACKBONE}/{name}" for name in levels}),
            TRACK: ({"bev": view} | points, objects, bev),
            INTERACT: (kept, {"next_queries": kept["queries"], "next_memory": memory}, {}),
            MAP: ({"bev": view}, drawn, bev),
            MOTION: (moving, going, bev | {"lanes": f"{MAP}/lanes"}),
            OCCUPANCY: (covered, {"occupied": logits}, bev | said | {"placed": f"{MOTION}/placed"}),
            PLANNING: (steered, {"plan": Port((1, config.planning_steps, 2), exact=True)}, bev | said),
        }
        return tuple(Part(name, GRAPH, module.eval(), *ends[name]) for name, module in modules.items())


def build(config: dict, where: Path) -> UniAD:
    check(config, DrivingConfig, where, REMEDY)
    parsed = DrivingConfig.model_validate(config)
    for wrong, said in (
        (parsed.embed_dims % (4 * parsed.num_heads), "'embed_dims' is no multiple of four times 'num_heads'"),
        (parsed.spatial_points % parsed.num_points_in_pillar, "'spatial_points' is no multiple of 'num_points_in_pillar'"),
        (parsed.occ_layers % (parsed.occ_n_future + 1), "'occ_layers' is no multiple of 'occ_n_future' + 1"),
        (parsed.camera_queries > parsed.cells, "'camera_queries' is more than there are cells"),
        (parsed.pc_range[0] >= parsed.pc_range[3] or parsed.pc_range[1] >= parsed.pc_range[4], "'pc_range' has no extent"),
    ):
        if wrong:
            raise UserError(where, said, REMEDY)
    return UniAD(parsed)

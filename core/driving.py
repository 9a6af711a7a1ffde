"""UniAD, a model that drives: what it is made of, base_e2e.py's numbers and those that an engine needs fixed, and what its parts are
called."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from suture.core.parts import PartFolder
from suture.core.reader import read_json
from suture.core.typed import Strict, check

BACKBONE, BEV_ENCODER, TRACK, INTERACT = "backbone", "bev_encoder", "track", "interact"
MAP, MOTION, OCCUPANCY, PLANNING = "map", "motion", "occupancy", "planning"
PARTS = (BACKBONE, BEV_ENCODER, TRACK, INTERACT, MAP, MOTION, OCCUPANCY, PLANNING)
REMEDY = "use the config.json that came with the weights"

Few = Annotated[int, Field(ge=1, le=64)]
Many = Annotated[int, Field(ge=1, le=4096)]
Metres = Annotated[float, Field(ge=-1000, le=1000)]


class DrivingConfig(Strict):
    # pictures
    cameras: Few = 6
    height: Annotated[int, Field(ge=32, le=4096, multiple_of=32)]  # as they are padded
    width: Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
    blocks: Annotated[list[Few], Field(min_length=4, max_length=4)]  # of ResNet's stages
    backbone_width: Many = 64  # channels behind the stem
    stage_with_dcn: Annotated[list[bool], Field(min_length=4, max_length=4)]
    # bird's-eye view
    embed_dims: Many
    num_heads: Few
    feedforward_channels: Many
    bev_h: Annotated[int, Field(ge=8, le=512, multiple_of=8)]
    bev_w: Annotated[int, Field(ge=8, le=512, multiple_of=8)]
    pc_range: Annotated[list[Metres], Field(min_length=6, max_length=6)]  # x, y, z from, x, y, z to
    encoder_layers: Few
    num_points_in_pillar: Few
    temporal_points: Few = 4
    spatial_points: Few = 8
    camera_queries: Annotated[int, Field(ge=1, le=1 << 18)]  # cells of the bird's-eye view that one camera sees, at most
    camera_overlap: Few  # cameras that see one cell, at most
    # objects
    num_query: Many
    num_classes: Few
    decoder_layers: Few
    decoder_points: Few = 4
    past_steps: Few = 4
    fut_steps: Few = 4
    memory_bank_len: Few = 4
    tracks: Many  # carried from frame to frame, at most
    score_thresh: Annotated[float, Field(ge=0, le=1)] = 0.4  # from which an object becomes a track
    filter_score_thresh: Annotated[float, Field(ge=0, le=1)] = 0.35  # below which a track is not shown, and at last forgotten
    miss_tolerance: Few = 5  # frames after which it is
    # lanes
    map_queries: Many
    map_encoder_layers: Few
    map_decoder_layers: Few
    map_levels: Literal[1, 4]  # of its attention; the published configuration says 4, of which one is there
    map_points: Few = 4
    num_things_classes: Few
    num_stuff_classes: Few
    thing_layers: Few
    stuff_layers: Few
    # motion
    motion_layers: Few
    motion_points: Few = 4
    predict_modes: Few
    predict_steps: Few
    group_id_list: Annotated[list[list[int]], Field(min_length=1, max_length=64)]  # classes that share anchors
    vehicle_id_list: list[int]
    # occupancy
    occ_n_future: Few
    occ_layers: Few
    occ_feedforward: Many
    bev_proj_nlayers: Few
    occ_bound: Metres  # metres to each side that it covers
    test_seg_thresh: Annotated[float, Field(ge=0, le=1)] = 0.1  # from which a cell counts as covered
    attn_mask_thresh: Annotated[float, Field(gt=0, lt=1)] = 0.3
    # planning
    planning_layers: Few = 3
    planning_steps: Few

    @property
    def cells(self) -> int:
        return self.bev_h * self.bev_w

    @property
    def agents(self) -> int:
        """The tracks, and behind them the vehicle itself."""
        return self.tracks + 1

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """Of the pictures' features: height and width at 1/8, 1/16, 1/32 and 1/64."""
        sizes = [(self.height // step, self.width // step) for step in (8, 16, 32)]
        height, width = sizes[-1]
        return [*sizes, ((height + 1) // 2, (width + 1) // 2)]


def drives(parts: Iterable[PartFolder]) -> bool:
    return set(PARTS) <= {part.name for part in parts}


def read_driving(checkpoint: Path) -> DrivingConfig:
    """Of a checkpoint's config.json. Raises UserError where it is none."""
    file = checkpoint / "config.json"
    content = read_json(file, REMEDY)
    check(content, DrivingConfig, file, REMEDY)
    return DrivingConfig.model_validate(content)

"""Which cells of a bird's-eye view each camera sees, and where in its picture: what UniAD's bev_encoder takes, from a calibration."""

import numpy as np

from suture.core.driving import DrivingConfig
from suture.core.errors import UserError

NEAR = 1e-5  # metres in front of a camera from which it sees
WHERE = "the cameras' calibration"


def seen_by_cameras(lidar2img: np.ndarray, config: DrivingConfig) -> dict[str, np.ndarray]:
    """`lidar2img` float [cameras,4,4]: points (x, y, z, 1) in metres to pixels times depth, of pictures as the graph takes them.

    Raises UserError where a camera sees more cells, or more cameras see one cell, than the graph has room for."""
    places, seen = projected(lidar2img, config)
    room, overlap = config.camera_queries, config.camera_overlap
    cells = np.zeros([config.cameras, room], np.int64)
    points = np.zeros([config.cameras, room, config.num_points_in_pillar, 2], np.float32)
    found = np.zeros([config.cells, overlap], np.int64)
    met = np.zeros(config.cells, np.int64)  # cameras so far
    for camera in range(config.cameras):
        own = np.flatnonzero(seen[camera])
        if len(own) > room:
            raise UserError(
                WHERE, f"camera {camera} sees {len(own)} cells, and the graph has room for {room}",
                'export with a larger "camera_queries" in config.json',
            )  # fmt: skip
        if len(own) and met[own].max() == overlap:
            raise UserError(
                WHERE, f"more than {overlap} cameras see one cell", 'export with a larger "camera_overlap" in config.json'
            )
        cells[camera, : len(own)] = own
        points[camera, : len(own)] = places[camera, own]
        found[own, met[own]] = camera * room + np.arange(len(own))
        met[own] += 1
    shares = (np.arange(overlap) < met[:, None]) / np.maximum(met, 1)[:, None]
    return {
        "camera_cells": cells[None],
        "camera_points": points[None],
        "cell_places": found[None],
        "cell_shares": shares.astype(np.float32)[None],
    }


def projected(lidar2img: np.ndarray, config: DrivingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell's pillar the places in each picture, (x, y) from 0 to 1 within it, float32 [cameras,cells,heights,2], and whether
    the camera sees any of them, bool [cameras,cells]."""
    low, high = np.array(config.pc_range[:3], np.float32), np.array(config.pc_range[3:], np.float32)
    tall = high[2] - low[2]
    z = np.linspace(0.5, tall - 0.5, config.num_points_in_pillar, dtype=np.float32) / tall
    y, x = ((np.arange(side, dtype=np.float32) + 0.5) / side for side in (config.bev_h, config.bev_w))
    y, x, z = (each.reshape(-1, config.num_points_in_pillar) for each in np.meshgrid(y, x, z, indexing="ij"))
    points = np.stack([x, y, z], -1) * (high - low) + low
    matrix = np.asarray(lidar2img, np.float32)[:, None, None]
    shown = np.einsum("cqpij,qpj->cqpi", np.broadcast_to(matrix, (len(matrix), *points.shape[:2], 4, 4)), _homogeneous(points))
    depth = shown[..., 2:3]
    places = shown[..., :2] / np.maximum(depth, NEAR) / np.array([config.width, config.height], np.float32)
    inside = (depth[..., 0] > NEAR) & ((places > 0) & (places < 1)).all(-1)
    return places.astype(np.float32), inside.any(-1)


def _homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones_like(points[..., :1])], -1)

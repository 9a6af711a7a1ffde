"""What a model makes of a frame as a picture from above: lanes, what will be covered, boxes, where each goes, and the plan."""

import numpy as np
from PIL import Image, ImageDraw

from suture.core.driving import DrivingConfig
from suture.runtime.driving import SeenFrame

SIDE = 240  # pixels
GROUND, AREA, LANE, COVERED = (28, 30, 36), (52, 56, 66), (96, 110, 140), (200, 70, 60)
COLOURS = ((250, 200, 60), (90, 200, 250), (140, 230, 120), (240, 130, 220), (250, 150, 90), (170, 160, 250))
EGO, PLAN = (255, 255, 255), (90, 250, 120)


def view(seen: SeenFrame, config: DrivingConfig) -> np.ndarray:
    """uint8 [SIDE,SIDE,3]; ahead is up."""
    picture = Image.fromarray(_ground(seen, config))
    draw = ImageDraw.Draw(picture)
    objects = seen.objects
    for row, number in enumerate(objects.ids):
        colour = COLOURS[number % len(COLOURS)]
        draw.polygon(_pixels(_corners(objects.boxes[row]), config), outline=colour)
        steps = seen.trajectories[row, seen.likely[row].argmax()]
        way = np.concatenate([objects.boxes[row, None, :2], objects.boxes[row, :2] + steps])
        draw.line(_pixels(way, config), fill=colour)
    ego = np.zeros(9, np.float32)
    ego[3:7] = 1.9, 4.5, 1.7, np.pi / 2
    draw.polygon(_pixels(_corners(ego), config), outline=EGO)
    draw.line(_pixels(np.concatenate([np.zeros([1, 2]), seen.plan]), config), fill=PLAN, width=2)
    return np.asarray(picture)


def _ground(seen: SeenFrame, config: DrivingConfig) -> np.ndarray:
    """The view's rows begin behind the vehicle: turned, so that ahead is up."""
    found = np.zeros([config.bev_h, config.bev_w, 3], np.float32) + GROUND
    lanes = seen.lanes.max(0)
    for share, colour in (
        (seen.area > 0.5, AREA),
        (lanes / max(float(lanes.max()), 1e-9), LANE),
        (seen.occupied.max(0) / max(float(seen.occupied.max()), 1e-9), COVERED),
    ):
        found += share[..., None] * (np.array(colour) - found)
    scaled = Image.fromarray(found[::-1].clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.asarray(scaled)


def _corners(box: np.ndarray) -> np.ndarray:
    """[4,2]: of a box from above; at angle 0 its length lies along x."""
    x, y, _, width, length, _, angle = box[:7]
    ahead, aside = np.array([np.cos(angle), np.sin(angle)]) * length / 2, np.array([-np.sin(angle), np.cos(angle)]) * width / 2
    middle = np.array([x, y])
    return np.stack([middle + ahead + aside, middle + ahead - aside, middle - ahead - aside, middle - ahead + aside])


def _pixels(points: np.ndarray, config: DrivingConfig) -> list[tuple[float, float]]:
    low, high = np.array(config.pc_range[:2]), np.array(config.pc_range[3:5])
    places = (points - low) / (high - low) * SIDE
    return [(float(x), float(SIDE - y)) for x, y in np.nan_to_num(places).clip(-SIDE, 2 * SIDE)]

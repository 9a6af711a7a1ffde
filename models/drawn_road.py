"""A drive that is drawn: a straight road with lanes, vehicles on it, and cameras on the vehicle in their midst, of known geometry."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

LANE, LANES = 3.6, 4  # metres, and how many
DASH = 6.0  # metres of a marking, and between two
SECONDS = 0.5  # between two frames
HEIGHT = 1.6  # of the cameras, in metres
SPAN = np.deg2rad(70)  # that a camera sees from left to right
MEAN = np.array([103.53, 116.28, 123.675])  # of blue, green and red, which the network's pictures are without
ROAD, MARKING, GRASS, SKY = (95, 95, 100), (235, 235, 235), (70, 120, 60), (150, 190, 230)
PAINTS = ((200, 50, 45), (45, 80, 190), (225, 190, 50), (235, 235, 235))


@dataclass(frozen=True)
class Car:
    x: float  # metres to the right of the road's middle
    y: float  # ahead of where the drive begins
    speed: float  # metres a second, ahead
    size: tuple[float, float, float] = (1.9, 4.5, 1.7)  # width, length, height
    paint: tuple[int, int, int] = PAINTS[0]


class DrawnRoad:
    """x to the right and y ahead of the vehicle, z up, in metres; its ground lies HEIGHT below. Frames are SECONDS apart."""

    def __init__(self, cameras: int, height: int, width: int, seed: int = 0, count: int = 5):
        self.height, self.width = height, width
        random = np.random.default_rng(seed)
        self.turns = [2 * np.pi * camera / cameras for camera in range(cameras)]
        self.speed = 6.0
        lanes = (np.arange(LANES) - (LANES - 1) / 2) * LANE
        self.x = float(lanes[2])
        self.cars = tuple(
            Car(float(lanes[index % LANES]), float(y), float(random.uniform(2, 9)), paint=PAINTS[index % len(PAINTS)])
            for index, y in enumerate(random.permutation(np.linspace(-24, 30, count)))
        )

    def lidar2img(self) -> np.ndarray:
        """float64 [cameras,4,4]: (x, y, z, 1) to pixels times depth."""
        focal = self.width / 2 / np.tan(SPAN / 2)
        inner = np.array([[focal, 0, self.width / 2, 0], [0, focal, self.height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        found = []
        for turn in self.turns:
            ahead, right = np.array([-np.sin(turn), np.cos(turn), 0]), np.array([np.cos(turn), np.sin(turn), 0])
            outer = np.eye(4)
            outer[:3, :3] = np.stack([right, [0, 0, -1], ahead])
            found.append(inner @ outer)
        return np.stack(found)

    def pose(self, frame: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Rotation [3,3] and translation [3] into the world, and the seconds."""
        return np.eye(3), np.array([self.x, frame * SECONDS * self.speed, 0.0]), frame * SECONDS

    def can_bus(self, frame: int) -> np.ndarray:
        """float32 [18]: what the vehicle has done since the frame before; y is ahead, and so is the angle of 90 degrees."""
        found = np.zeros(18, np.float32)
        found[1] = 0 if frame == 0 else SECONDS * self.speed
        found[-2] = np.pi / 2
        return found

    def boxes(self, frame: int) -> np.ndarray:
        """float64 [cars,6]: x, y, z of each middle, width, length and height."""
        ego, rows = frame * SECONDS * self.speed, []
        for car in self.cars:
            rows.append([car.x - self.x, car.y + frame * SECONDS * car.speed - ego, car.size[2] / 2 - HEIGHT, *car.size])
        return np.array(rows)

    def pictures(self, frame: int) -> np.ndarray:
        """uint8 [cameras,H,W,3], red, green and blue."""
        matrices = self.lidar2img()
        return np.stack([self._picture(matrix, turn, frame) for matrix, turn in zip(matrices, self.turns)])

    def network_pictures(self, frame: int) -> np.ndarray:
        """float32 [cameras,3,H,W], as the network takes them."""
        return (self.pictures(frame)[..., ::-1] - MEAN).transpose(0, 3, 1, 2).astype(np.float32)

    def _picture(self, matrix: np.ndarray, turn: float, frame: int) -> np.ndarray:
        picture = Image.fromarray(self._ground(matrix, frame))
        draw = ImageDraw.Draw(picture)
        boxes = self.boxes(frame)
        for index in np.argsort(-np.hypot(boxes[:, 0], boxes[:, 1])):
            x, y, z, *size = boxes[index]
            signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) / 2
            corners = np.array([x, y, z]) + signs * size
            shown = np.concatenate([corners, np.ones([8, 1])], 1) @ matrix.T
            if (shown[:, 2] < 0.5).any():
                continue
            points = shown[:, :2] / shown[:, 2:3]
            for shade, face in zip((0.6, 0.6, 0.8, 0.8, 0.5, 1.0), FACES):
                if _turned_to_us(points[face]):
                    draw.polygon([tuple(point) for point in points[face]], fill=_shaded(self.cars[index].paint, shade))
        return np.asarray(picture)

    def _ground(self, matrix: np.ndarray, frame: int) -> np.ndarray:
        """What lies where a pixel's ray meets the ground, or the sky."""
        y, x = np.mgrid[0 : self.height, 0 : self.width] + 0.5
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(matrix[:3, :3]).T
        down = rays[..., 2] < -1e-6
        far = np.where(down, -HEIGHT / np.where(down, rays[..., 2], 1), 0)
        across, along = rays[..., 0] * far + self.x, rays[..., 1] * far + frame * SECONDS * self.speed
        found = np.where(down[..., None], GRASS, SKY).astype(np.uint8)
        on = down & (abs(across) < LANES * LANE / 2)
        edge = abs(across / LANE - np.rint(across / LANE)) * LANE < 0.12
        dashed = (along % (2 * DASH) < DASH) | (abs(across) > LANES * LANE / 2 - 0.2)
        found[on] = ROAD
        found[on & edge & dashed] = MARKING
        return found


FACES = (
    [0, 1, 3, 2],
    [5, 4, 6, 7],
    [1, 0, 4, 5],
    [2, 3, 7, 6],
    [0, 2, 6, 4],
    [3, 1, 5, 7],
)  # left, right, rear, front, under, top


def _turned_to_us(points: np.ndarray) -> bool:
    (ax, ay), (bx, by) = points[1] - points[0], points[2] - points[1]
    return ax * by - ay * bx > 0


def _shaded(paint: tuple[int, ...], shade: float) -> tuple[int, ...]:
    return tuple(int(part * shade) for part in paint)

"""A short video that is drawn: one textured picture that waves and drifts, so that where each pixel of a frame comes from is known."""

import numpy as np

from suture.models.drawn_pictures import random_scene

FINE = 4  # pixels of the picture that is drawn for one of a frame, along each axis
STRIPES, CONTRAST = 9, 14  # across the picture, and in 0..255: what shows a motion where a shape has one colour
BEYOND = 0.3  # how much of a frame the picture reaches beyond its edges


class DrawnVideo:
    def __init__(self, height: int, width: int, frames: int, seed: int = 0):
        self.height, self.width, self.frames = height, width, frames
        tall, wide = (round(side * (1 + 2 * BEYOND)) * FINE for side in (height, width))
        scene = random_scene(np.random.default_rng(seed), tall, wide, 5)
        y, x = np.mgrid[0:tall, 0:wide] / np.array([tall, wide])[:, None, None]
        texture = np.sin(2 * np.pi * STRIPES * (x + y)) + np.sin(2 * np.pi * STRIPES * (x - y))
        self.picture = np.clip(scene.picture(tall, wide) + CONTRAST / 2 * texture[..., None], 0, 255).astype(np.float32)

    def places(self, frame: int) -> np.ndarray:
        """Where in the first frame the pixels of a frame are: (y, x) from 0 to 1 within it, float32 [height, width, 2]."""
        y, x = ((np.arange(side) + 0.5) / side for side in (self.height, self.width))
        y, x = np.meshgrid(y, x, indexing="ij")
        time = frame / self.frames

        def moved(y, x, time):
            phase = 2 * np.pi * time
            down = 0.03 * (np.sin(2 * np.pi * x + phase) - np.sin(2 * np.pi * x)) + 0.06 * time
            right = 0.03 * (np.sin(2 * np.pi * y + phase) - np.sin(2 * np.pi * y)) - 0.05 * np.sin(phase)
            return y + down, x + right

        return np.stack(moved(y, x, time), -1).astype(np.float32)

    def frame(self, number: int) -> np.ndarray:
        """uint8 [height, width, 3]"""
        return self.sampled(self.picture, number)

    def sampled(self, picture: np.ndarray, number: int) -> np.ndarray:
        """The frame of another picture of the same size, that moves alike."""
        places = (self.places(number) + BEYOND) / (1 + 2 * BEYOND) * np.array(picture.shape[:2]) - 0.5
        low = np.clip(np.floor(places).astype(int), 0, np.array(picture.shape[:2]) - 2)
        part = (places - low)[..., None]
        y, x = low[..., 0], low[..., 1]
        upper = picture[y, x] * (1 - part[..., 1, :]) + picture[y, x + 1] * part[..., 1, :]
        lower = picture[y + 1, x] * (1 - part[..., 1, :]) + picture[y + 1, x + 1] * part[..., 1, :]
        return np.clip(np.rint(upper * (1 - part[..., 0, :]) + lower * part[..., 0, :]), 0, 255).astype(np.uint8)

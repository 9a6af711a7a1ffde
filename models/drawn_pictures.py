"""Pictures that are drawn, with what they show: the data that the small picture models are trained and judged on.

A scene is a few shapes of one colour each, apart from each other, on a background. Everything about a picture follows from its scene:
the caption ("a red circle left of a blue square on a grey background"), each shape's mask, the edges that a ControlNet is given, and
whether some other picture shows the same (`shows`), which is how a generated picture is judged without a second network.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 220),
}
BACKGROUNDS = {"white": (240, 240, 240), "grey": (130, 130, 130), "black": (20, 20, 20)}
KINDS = ("circle", "square", "triangle", "cross")
SAME = 0.8  # intersection over union from which a shape counts as shown; a circle has 0.785 with the square around it


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    y: float  # centre, in pixels from the top
    x: float  # from the left
    radius: float  # half of the side of the square around it, in pixels

    def distance(self, height: int, width: int) -> np.ndarray:
        """Each pixel's distance to the outline in pixels, float32 [height, width], negative inside."""
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
        y, x = y - self.y, x - self.x
        if self.kind == "circle":
            return np.hypot(y, x) - self.radius
        if self.kind == "square":
            return np.maximum(abs(y), abs(x)) - self.radius
        if self.kind == "triangle":  # the point above, the base on the square's lower side
            return np.maximum(y - self.radius, (2 * abs(x) - y - self.radius) / np.sqrt(5))
        arm = self.radius / 2.5
        upright, level = np.maximum(abs(x) - arm, abs(y) - self.radius), np.maximum(abs(y) - arm, abs(x) - self.radius)
        return np.minimum(upright, level)


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    background: str
    shade: tuple[float, float]  # how much brighter the background becomes from top to bottom and from left to right, in 0..255

    def caption(self) -> str:
        """What the scene shows; of two shapes where the first one lies from the second as well."""
        names = [f"a {shape.colour} {shape.kind}" for shape in self.shapes]
        if len(names) == 2:
            text = f"{names[0]} {self._place()} {names[1]}"
        else:
            text = " and ".join([", ".join(names[:-1]), names[-1]]) if names[1:] else names[0]
        return f"{text} on a {self.background} background"

    def _place(self) -> str:
        down, right = self.shapes[0].y - self.shapes[1].y, self.shapes[0].x - self.shapes[1].x
        if abs(right) > abs(down):
            return "right of" if right > 0 else "left of"
        return "below" if down > 0 else "above"

    def masks(self, height: int, width: int) -> np.ndarray:
        """The pixels of each shape: bool [shapes, height, width]."""
        return np.stack([shape.distance(height, width) < 0 for shape in self.shapes])

    def edges(self, height: int, width: int) -> np.ndarray:
        """The outlines, one pixel wide, white on black: uint8 [height, width, 3], as ControlNet takes an edge detector's picture."""
        lines = np.zeros([height, width], bool)
        for mask in self.masks(height, width):
            around = np.pad(mask, 1)
            inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
            lines |= mask & ~inside
        return np.repeat(lines[..., None], 3, -1).astype(np.uint8) * 255

    def picture(self, height: int, width: int) -> np.ndarray:
        """The scene with smooth outlines: uint8 [height, width, 3]."""
        down, right = np.linspace(-0.5, 0.5, height)[:, None, None], np.linspace(-0.5, 0.5, width)[None, :, None]
        canvas = np.array(BACKGROUNDS[self.background]) + self.shade[0] * down + self.shade[1] * right
        for shape in self.shapes:
            covered = np.clip(0.5 - shape.distance(height, width), 0, 1)[..., None]  # the part of each pixel
            canvas = canvas + covered * (np.array(COLOURS[shape.colour]) - canvas)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def random_scene(random: np.random.Generator, height: int, width: int, shapes: int = 2) -> Scene:
    """A scene of `shapes` shapes for a picture of that size: no two of one colour, none touching another or the border, and of two
    the one clearly beside or above the other."""
    short = min(height, width)
    colours = random.permutation(list(COLOURS))[:shapes]
    largest = 0.21 if shapes <= 2 else 0.32 / np.sqrt(shapes)
    while True:
        radii = random.uniform(0.6, 1, shapes) * largest * short
        y, x = (random.uniform(radii + 1, side - radii - 1) for side in (height, width))
        down, right = abs(y[:, None] - y), abs(x[:, None] - x)
        far = np.maximum(down, right) - (radii[:, None] + radii)
        clear = abs(down - right) if shapes == 2 else np.full_like(far, short)
        if (np.minimum(far, clear - 0.08 * short) + 1e9 * np.eye(shapes) > 2).all():
            break
    kinds = random.choice(KINDS, shapes)
    placed = (Shape(str(k), str(c), float(b), float(a), float(r)) for k, c, b, a, r in zip(kinds, colours, y, x, radii))
    background = str(random.choice(list(BACKGROUNDS)))
    return Scene(tuple(placed), background, tuple(float(part) for part in random.uniform(-25, 25, 2)))


def shows(picture: np.ndarray, scene: Scene) -> bool:
    """Whether a picture, uint8 [height, width, 3], shows the scene: the pixels nearest to each shape's colour are that shape's, and the
    others' median is nearest to the background's."""
    names = [*COLOURS, *BACKGROUNDS]
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    masks = scene.masks(*picture.shape[:2])

    def nearest(pixels: np.ndarray) -> np.ndarray:
        return np.linalg.norm(pixels[..., None, :].astype(np.float32) - palette, axis=-1).argmin(-1)

    seen = nearest(picture)
    for shape, mask in zip(scene.shapes, masks):
        of_colour = seen == names.index(shape.colour)
        if (of_colour & mask).sum() < SAME * (of_colour | mask).sum():
            return False
    around = np.median(picture[~masks.any(0)], axis=0)
    return names[int(nearest(around))] == scene.background

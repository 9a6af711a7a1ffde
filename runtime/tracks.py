"""Objects from frame to frame: which query is which object, since when, and what of it goes into the next frame.

The published code keeps as many as there are; here are as many places as the graphs have, and where more are found the likeliest stay.
"""

from dataclasses import dataclass, field

import numpy as np

from suture.core.driving import DrivingConfig

SAVED = 3  # frames until a track's embedding is remembered again
REACH = np.array([61.2, 61.2, 10.0], np.float32)  # metres from the middle within which an object is shown

Arrays = dict[str, np.ndarray]


@dataclass
class Pose:
    """Of the vehicle: its rotation float [3,3] and translation [3] in the world, as rows of points take them, and seconds."""

    rotation: np.ndarray
    translation: np.ndarray
    time: float


@dataclass
class Objects:
    """Those of a frame that are shown, the vehicle itself behind them, in as many places as there are."""

    ids: list[int]
    scores: np.ndarray  # float [objects + the vehicle]
    labels: np.ndarray
    boxes: np.ndarray  # float32 [objects + the vehicle, 9]: x, y, z, width, length, height, angle, velocity x and y
    embeddings: np.ndarray


@dataclass
class Tracks:
    config: DrivingConfig
    known: int = 0  # objects so far
    pose: Pose | None = None
    ids: np.ndarray = field(init=False)  # int [tracks], -1 where there is none
    missed: np.ndarray = field(init=False)  # frames in which each was not found
    waits: np.ndarray = field(init=False)  # frames until it is remembered again
    state: Arrays = field(init=False)  # queries, memory, remembered, points, boxes

    def __post_init__(self) -> None:
        config, count = self.config, self.config.tracks
        self.ids = np.full(count, -1)
        self.missed, self.waits = np.zeros(count, int), np.zeros(count, int)
        width, frames = config.embed_dims, config.memory_bank_len
        shapes = {"queries": (2 * width,), "memory": (frames, width), "remembered": (frames,), "points": (3,), "boxes": (10,)}
        self.state = {name: np.zeros((count, *shape), np.float32) for name, shape in shapes.items()}

    def given(self, pose: Pose) -> Arrays:
        """What `track` takes, in a frame seen from there."""
        points = self.state["points"][:, :2] if self.pose is None else self._moved(self.pose, pose)
        self.pose = pose
        return {
            "track_queries": self.state["queries"][None],
            "track_points": np.where((self.ids >= 0)[:, None], points, 0).astype(np.float32)[None],
            "track_active": (self.ids >= 0).astype(np.int64)[None],
        }

    def _moved(self, before: Pose, now: Pose) -> np.ndarray:
        """Where each is now, by its velocity and the vehicle's."""
        low, high = (np.array(self.config.pc_range[each], np.float64) for each in (slice(0, 3), slice(3, 6)))
        place = low + (high - low) / (1 + np.exp(-self.state["points"].astype(np.float64)))
        place[:, :2] += self.state["boxes"][:, 8:] * (now.time - before.time)
        place = (place @ before.rotation + before.translation - now.translation) @ np.linalg.inv(now.rotation)
        share = ((place - low) / (high - low)).clip(1e-5, 1 - 1e-5)
        return np.log(share / (1 - share))[:, :2]

    def found(self, made: Arrays) -> tuple[Objects, Arrays]:
        """From what `track` made: the objects that are shown, and what `interact` takes of the tracks that there are now."""
        config, learned = self.config, self.config.num_query + 1
        logits, boxes = made["logits"][0], made["boxes"][0]
        scores = 1 / (1 + np.exp(-logits.max(-1)))
        ids = np.concatenate([np.full(learned, -1), self.ids])
        missed, waits = (np.concatenate([np.zeros(learned, int), each]) for each in (self.missed, self.waits))
        missed[scores >= config.score_thresh] = 0
        born = np.flatnonzero((ids[: config.num_query] < 0) & (scores[: config.num_query] >= config.score_thresh))
        ids[born] = self.known + np.arange(len(born))
        self.known += len(born)
        weak = (ids >= 0) & (scores < config.filter_score_thresh)
        missed[weak] += 1
        ids[weak & (missed >= config.miss_tolerance)] = -1
        kept = np.flatnonzero(ids >= 0)
        kept = np.sort(kept[np.argsort(-scores[kept], kind="stable")[: config.tracks]])
        decoded = decode(boxes)
        shown = kept[(scores[kept] >= config.filter_score_thresh) & (np.abs(decoded[kept, :3]) <= REACH).all(-1)]
        rows = np.append(shown, config.num_query)  # the vehicle's own query is the last learned one
        objects = Objects(
            ids[shown].tolist(), scores[rows], logits[rows].argmax(-1), decoded[rows], made["embeddings"][0, rows]
        )
        memory = {}
        for name in ("memory", "remembered"):
            none = np.zeros((learned, *self.state[name].shape[1:]), np.float32)
            memory[name] = np.concatenate([none, self.state[name]])
        sources = {"queries": made["queries"][0], "points": made["points"][0], "boxes": boxes, **memory}
        self.ids, self.missed, self.waits = (
            self._placed(each[kept], empty) for each, empty in ((ids, -1), (missed, 0), (waits, 0))
        )
        self.state = {name: self._placed(sources[name][kept], 0) for name in self.state}
        saves = (self.ids >= 0) & (self.waits == 0)
        taken = {
            "embeddings": self._placed(made["embeddings"][0, kept], 0)[None],
            "queries": self.state["queries"][None],
            "memory": self.state["memory"][None],
            "remembered": self.state["remembered"].astype(np.int64)[None],
            "saves": saves.astype(np.int64)[None],
            "active": (self.ids >= 0).astype(np.int64)[None],
        }
        return objects, taken

    def keep(self, taken: Arrays, made: Arrays) -> None:
        """What `interact` made of what it took."""
        saves = taken["saves"][0] > 0
        shifted = np.concatenate([self.state["remembered"][:, 1:], np.ones([self.config.tracks, 1], np.float32)], 1)
        self.state["remembered"] = np.where(saves[:, None], shifted, self.state["remembered"])
        self.state["queries"], self.state["memory"] = made["next_queries"][0], made["next_memory"][0]
        self.waits = np.where(saves, SAVED, np.maximum(self.waits - 1, 0))

    def _placed(self, rows: np.ndarray, empty: int) -> np.ndarray:
        return filled(rows, self.config.tracks, empty)


def filled(rows: np.ndarray, count: int, empty: float = 0) -> np.ndarray:
    """Rows in as many places, empty ones behind them."""
    return np.concatenate([rows, np.full((count - len(rows), *rows.shape[1:]), empty, rows.dtype)])


def decode(boxes: np.ndarray) -> np.ndarray:
    """float32 [N,10] as the network has them to [N,9] as Objects has them."""
    x, y, width, length, z, height, sine, cosine, *velocity = boxes.T
    sizes = (np.exp(each) for each in (width, length, height))
    return np.stack([x, y, z, *sizes, np.arctan2(sine, cosine), *velocity], -1).astype(np.float32)

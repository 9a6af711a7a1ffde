"""UniAD frame by frame, whatever runs its parts: pictures of the cameras to objects, lanes, trajectories, occupancy and a plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from suture.core.driving import BACKBONE, BEV_ENCODER, INTERACT, MAP, MOTION, OCCUPANCY, PLANNING, TRACK, DrivingConfig
from suture.runtime.cameras import seen_by_cameras
from suture.runtime.tracks import Objects, Pose, Tracks, filled

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # inputs by name, floats as float32, to outputs by name


@dataclass(frozen=True)
class Frame:
    pictures: np.ndarray  # float32 [cameras,3,H,W], BGR without the mean
    lidar2img: np.ndarray  # float [cameras,4,4]
    can_bus: np.ndarray  # float [18], of which place and angle count from the frame before
    pose: Pose
    command: int  # 0 right, 1 left, 2 straight on


@dataclass(frozen=True)
class SeenFrame:
    """What a model makes of a frame."""

    objects: Objects
    trajectories: np.ndarray  # float32 [objects + the vehicle, modes, steps, 2], in metres from each
    likely: np.ndarray  # [objects + the vehicle, modes]: logarithms
    occupied: np.ndarray  # float32 [steps,H,W]: how sure it is that a vehicle covers a cell
    lanes: np.ndarray  # float32 [kinds,H,W]: of each kind of lane how sure it is
    area: np.ndarray  # float32 [H,W]: how sure it is that one may drive there
    plan: np.ndarray  # float32 [steps,2], in metres


class DrivingModel:
    def __init__(self, runs: Mapping[str, Run], config: DrivingConfig):
        self.runs, self.config = runs, config
        self.start()

    def start(self) -> None:
        """Of a scene's first frame: nothing is known."""
        config = self.config
        self.tracks = Tracks(config)
        self.view: np.ndarray | None = None

    def step(self, frame: Frame) -> SeenFrame:
        """The next frame of the scene. Raises UserError for a calibration that the graph has no room for."""
        config, runs = self.config, self.runs
        levels = runs[BACKBONE]({"pictures": frame.pictures[None].astype(np.float32)})
        first = self.view is None
        empty = np.zeros([1, config.cells, config.embed_dims], np.float32)
        state = {
            "can_bus": frame.can_bus[None].astype(np.float32),
            "previous_bev": empty if first else self.view,
            "continues": np.array([not first], np.int64),
        }
        self.view = runs[BEV_ENCODER](levels | state | seen_by_cameras(frame.lidar2img, config))["bev"]
        view = {"bev": self.view}
        objects, taken = self.tracks.found(runs[TRACK](view | self.tracks.given(frame.pose)))
        self.tracks.keep(taken, runs[INTERACT](taken))
        drawn = runs[MAP](view)
        agents = {"agents": self._placed(objects.embeddings)}
        moving = {
            "agent_places": self._placed(objects.boxes[:, [0, 1, 6]]),
            "agent_labels": self._placed(objects.labels.astype(np.int64)),
            "agent_active": self._placed(np.ones(len(objects.labels), np.int64)),
            "lanes": drawn["lanes"],
        }
        going = runs[MOTION](view | agents | moving)
        said = {"modes": going["modes"]}
        vehicles = np.isin(objects.labels, config.vehicle_id_list)
        vehicles[-1] = False  # itself is not looked for
        which = {"placed": going["placed"], "vehicles": self._placed(vehicles.astype(np.int64))}
        covered = _taken(runs[OCCUPANCY](view | agents | said | which)["occupied"], objects)
        plan = runs[PLANNING](view | agents | said | {"command": np.array([frame.command], np.int64)})["plan"][0]
        sure = 1 / (1 + np.exp(-covered[vehicles])) * objects.scores[vehicles][:, None, None, None]
        return SeenFrame(
            objects,
            _taken(going["trajectories"], objects)[..., :2],
            _taken(going["likely"], objects),
            sure.max(0, initial=0.0).astype(np.float32),
            *self._map(drawn),
            plan,
        )

    def _map(self, drawn: Arrays) -> tuple[np.ndarray, np.ndarray]:
        scores, masks = 1 / (1 + np.exp(-drawn["lane_logits"][0])), drawn["masks"][0]
        lanes = masks[: len(scores)]
        return np.stack([(lanes * share[:, None, None]).max(0) for share in scores.T]), masks[len(scores)]

    def _placed(self, rows: np.ndarray) -> np.ndarray:
        """Objects in front, the vehicle itself in the last place."""
        return np.concatenate([filled(rows[:-1], self.config.tracks), rows[-1:]])[None]


def _taken(placed: np.ndarray, objects: Objects) -> np.ndarray:
    """Back from there."""
    return np.concatenate([placed[0, : len(objects.ids)], placed[0, -1:]])

"""Level 5 of a model that drives: PyTorch in float32, its weights rounded to the graphs' type, and the portable graphs, over some frames
of a drawn drive. Each carries its own view and tracks from frame to frame, so that what differs in one is met again in those after.
"""

import base64
import io

import numpy as np
from onnx import TensorProto
from PIL import Image

from suture.core.driving import PARTS, TRACK, DrivingConfig, read_driving
from suture.core.errors import UserError
from suture.models.drawn_road import DrawnRoad
from suture.runtime.driving import DrivingModel, Frame, SeenFrame
from suture.runtime.tracks import Pose
from suture.validate.compare import DIFFERENT, PASSED
from suture.validate.driving_picture import view
from suture.validate.graph_part import in_onnxruntime, in_pytorch, make_inputs
from suture.validate.level import DriveResult, Level, failed, not_run
from suture.validate.pipeline import NOT_HERE, Pipeline

TITLE = "A drawn drive"
FRAMES, LARGE_FRAMES, LARGE = 5, 2, 1 << 20  # frames, by the pixels of all cameras
SHOWN = 3
STRAIGHT_ON = 2
# How far two models' boxes, trajectories and plans may be apart, in metres, in each type: what rounding moves over some frames.
METRES = {TensorProto.FLOAT: 0.01, TensorProto.FLOAT16: 0.5, TensorProto.BFLOAT16: 0.5}
# The least intersection over union of the cells that both say will be covered.
ALIKE = {TensorProto.FLOAT: 0.999, TensorProto.FLOAT16: 0.97, TensorProto.BFLOAT16: 0.97}


def driving_level(pipeline: Pipeline, seed: int) -> Level:
    parts = {files.part.name: files for files in pipeline.parts}
    if any(parts[name].portable is None for name in PARTS):
        return not_run(5, "surgery has not been run on all parts", TITLE)
    if pipeline.checkpoint is None:
        return not_run(5, NOT_HERE, TITLE)
    try:
        dtype, _ = make_inputs(parts[TRACK].exported, parts[TRACK].part, seed)
        config = read_driving(pipeline.checkpoint)
        of_torch = {name: in_pytorch(pipeline.checkpoint, parts[name], dtype).run for name in PARTS}
        of_graphs = {name: in_onnxruntime(parts[name].portable, "portable").run for name in PARTS}
        models = DrivingModel(of_torch, config), DrivingModel(of_graphs, config)
        found = compare_drives(*models, config, METRES[dtype], ALIKE[dtype], seed)
    except UserError as error:
        return failed(5, error, TITLE)
    return Level(5, TITLE, PASSED if found.passed else DIFFERENT, drive=found)


def compare_drives(
    reference: DrivingModel, candidate: DrivingModel, config: DrivingConfig, metres: float, alike: float, seed: int
) -> DriveResult:
    road = DrawnRoad(config.cameras, config.height, config.width, seed)
    count = FRAMES if config.cameras * config.height * config.width <= LARGE else LARGE_FRAMES
    found, rows = DriveResult("PyTorch", "portable", count, metres, alike), []
    for number in range(count):
        frame = frame_of(road, number)
        ours, theirs = reference.step(frame), candidate.step(frame)
        _compare(found, ours, theirs, config)
        if number < SHOWN:
            rows.append(_row(road.pictures(number), *(view(each, config) for each in (ours, theirs))))
    found.shown = _png(np.concatenate(rows))
    return found


def frame_of(road: DrawnRoad, number: int) -> Frame:
    return Frame(road.network_pictures(number), road.lidar2img(), road.can_bus(number), Pose(*road.pose(number)), STRAIGHT_ON)


def _compare(found: DriveResult, ours: SeenFrame, theirs: SeenFrame, config: DrivingConfig) -> None:
    ids, others = ours.objects.ids, theirs.objects.ids
    both = [each for each in ids if each in others]
    found.objects += len(set(ids) | set(others))
    found.same += sum(bool(ours.objects.labels[ids.index(each)] == theirs.objects.labels[others.index(each)]) for each in both)
    mine, their = ([*(known.index(each) for each in both), -1] for known in (ids, others))
    boxes = abs(ours.objects.boxes[mine, :3] - theirs.objects.boxes[their, :3])
    moves = abs(ours.trajectories[mine] - theirs.trajectories[their])
    found.box = max(found.box, float(boxes.max()))
    found.trajectory = max(found.trajectory, float(moves.max()))
    found.plan = max(found.plan, float(abs(ours.plan - theirs.plan).max()))
    covered = [each.occupied > config.test_seg_thresh for each in (ours, theirs)]
    found.covered += int((covered[0] | covered[1]).sum())
    found.covered_same += int((covered[0] & covered[1]).sum())


def _row(pictures: np.ndarray, *views: np.ndarray) -> np.ndarray:
    """The cameras one below the other, beside them both models' views."""
    side = views[0].shape[0]
    shown = Image.fromarray(np.concatenate(pictures[: max(1, side // pictures.shape[1])]))
    scaled = shown.resize((side * 4 // 3, side), Image.Resampling.NEAREST)
    return np.concatenate([np.asarray(scaled), *views], 1)


def _png(pixels: np.ndarray) -> str:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"

"""Makes tiny-uniad: random weights, from a seed, of its config.json.

    python -m benchmarks.tiny_uniad                 # into models/tiny-uniad
    python -m benchmarks.tiny_uniad --out DIR

It has learned nothing of roads: it is there to be exported, cut up, built and compared. Of the random values some are moved, so that
a drive shows something: anchors reach some metres, boxes are as large as vehicles, and masks are not all behind their last ReLU.
The area's score is one number: it is moved away from zero.

What a query's class is read with is fitted by least squares over a drawn drive: two queries find an object in each frame, which stays a
track, and the others none. So every score is far from the thresholds, and no rounding makes or ends a track.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from suture.core.driving import TRACK, read_driving
from suture.models import random_weights
from suture.models.architectures import load_model, open_checkpoint
from suture.models.drawn_road import DrawnRoad
from suture.models.parts import Part
from suture.runtime.driving import DrivingModel
from suture.validate.driving import FRAMES, frame_of

FOUND = {3: 0, 11: 8}  # the queries that find something, and its class
HIGH, LOW = 3.0, -4.0  # logits
ROUNDS = 4  # the first without a track, each later one with those that the classes before made
RIDGE = 0.01
DAMPED = (  # so that layers do not mix queries beyond recognition
    *(
        f"pts_bbox_head.transformer.decoder.layers.{{layer}}.{name}"
        for name in ("attentions.0.attn.out_proj", "attentions.1.output_proj", "ffns.0.layers.1")
    ),
    "query_interact.linear_feat2",
    "query_interact.linear_pos2",
)

HERE = Path(__file__).resolve().parents[1] / "models" / "tiny-uniad"
SIZES = (2, 3, 5)  # of a box's numbers: the logarithms of its width, length and height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write(config, Path(folder), "float32", seed=0)
        weights = load_file(Path(folder) / "model.safetensors")
    for name in {each.format(layer=layer) for each in DAMPED for layer in range(config["decoder_layers"])}:
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] *= 0.3
    weights[f"seg_head.cls_stuff_branches.{config['stuff_layers'] - 1}.bias"] += 1.0
    weights["motion_head.kmeans_anchors"] *= 100
    for kind in ("things", "stuff"):
        for layer in ("linear_l1", "linear"):
            weights[f"seg_head.{kind}_mask_head.attnen.{layer}.0.bias"] += 0.5
    for layer in range(config["decoder_layers"]):
        weights[f"pts_bbox_head.reg_branches.{layer}.4.weight"][list(SIZES)] *= 0.2
        weights[f"pts_bbox_head.reg_branches.{layer}.4.bias"][list(SIZES)] += torch.tensor([1.9, 4.5, 1.7]).log()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.out.resolve() != HERE:
        shutil.copy(HERE / "config.json", options.out)
    write(weights, options.out)
    classes = f"pts_bbox_head.cls_branches.{config['decoder_layers'] - 1}.6"
    weights[f"{classes}.weight"], weights[f"{classes}.bias"] = fitted(options.out)
    write(weights, options.out)


def write(weights: dict[str, torch.Tensor], folder: Path) -> None:
    kept = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def fitted(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [classes,width] and bias [classes] of the layer that says a query's class."""
    config, model = read_driving(folder), load_model(open_checkpoint(folder), torch.float32)
    *before, last = model.pts_bbox_head.cls_branches[-1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each frame its queries, and which of them are tracks

    def called(part: Part):
        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            given = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in part.inputs}
            with torch.inference_mode():
                made = part.module(*given.values())
            made = dict(zip(part.outputs, [made] if isinstance(made, torch.Tensor) else made))
            if part.name == TRACK:
                seen.append((made["embeddings"][0].clone(), given["track_active"][0] > 0))
            return {name: value.numpy() for name, value in made.items()}

        return run

    runs = {part.name: called(part) for part in model.parts()}
    road = DrawnRoad(config.cameras, config.height, config.width)
    learned = config.num_query + 1
    last.bias.data -= 10
    features, wanted = [], []
    for _ in range(ROUNDS):
        seen.clear()
        driving = DrivingModel(runs, config)
        for number in range(FRAMES):
            driving.step(frame_of(road, number))
        for queries, active in seen:
            x = torch.nn.Sequential(*before)(queries)
            kinds = [FOUND.get(query) for query in range(config.num_query)]
            kinds += [_nearest(row) for row in last(x[learned:])[active]]
            features.append(torch.cat([x[: config.num_query], x[learned:][active]]))
            wanted += [[HIGH if kind == each else LOW for each in range(config.num_classes)] for kind in kinds]
        given, logits = torch.cat(features).double(), torch.tensor(wanted).double()
        given = torch.cat([given, torch.ones(len(given), 1)], 1)
        weights = torch.where(logits.amax(1) > 0, 4.0, 1.0)[:, None]
        left = (given * weights).T @ given + RIDGE * torch.eye(given.shape[1])
        found = torch.linalg.solve(left, (given * weights).T @ logits)
        last.weight.data, last.bias.data = found[:-1].T.float().contiguous(), found[-1].float()
    return last.weight.data, last.bias.data


def _nearest(logits: torch.Tensor) -> int:
    """A track's class: that of those looked for which it has most."""
    return max(FOUND.values(), key=lambda kind: float(logits[kind]))


if __name__ == "__main__":
    main()

"""Makes tiny-uniad: random weights, from a seed, of this folder's config.json.

    python models/tiny-uniad/make.py                 # into models/tiny-uniad
    python models/tiny-uniad/make.py --out DIR

Nothing is trained: it is there to be exported, cut up, built and compared. Of the random values some are moved, so that a drive shows
something: fewer queries become tracks, anchors reach some metres, boxes are as large as vehicles, not every cell is covered
alike, and masks are not all behind their last ReLU. The area's score is one number: it is moved away from zero.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models import random_weights

HERE = Path(__file__).resolve().parent
SIZES = (2, 3, 5)  # of a box's numbers: the logarithms of its width, length and height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write(config, Path(folder), "float32", seed=0)
        weights = load_file(Path(folder) / "model.safetensors")
    last = config["decoder_layers"] - 1
    weights[f"pts_bbox_head.cls_branches.{last}.6.bias"] -= 2.0
    weights[f"seg_head.cls_stuff_branches.{config['stuff_layers'] - 1}.bias"] += 1.0
    weights["motion_head.kmeans_anchors"] *= 100
    for name in ("weight", "bias"):
        weights[f"occ_head.query_to_occ_feat.layers.2.{name}"] *= 6
    for kind in ("things", "stuff"):
        for layer in ("linear_l1", "linear"):
            weights[f"seg_head.{kind}_mask_head.attnen.{layer}.0.bias"] += 0.5
    for layer in range(config["decoder_layers"]):
        weights[f"pts_bbox_head.reg_branches.{layer}.4.weight"][list(SIZES)] *= 0.2
        weights[f"pts_bbox_head.reg_branches.{layer}.4.bias"][list(SIZES)] += torch.tensor([1.9, 4.5, 1.7]).log()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(kept, options.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

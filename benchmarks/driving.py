"""UniAD at base_e2e's width, one layer of each kind: what export, surgery and the engine of each part take, without a GPU.

    python -m benchmarks.driving --part bev_encoder            # room for the cells that a camera sees, at a quarter of the view's cells
    python -m benchmarks.driving --part bev_encoder --dense    # room for all cells: masked dense
    python -m benchmarks.driving --part map --size 200         # the whole view; any other part as well

How much room the cameras need is measured on six that look around, with 70 degrees each.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from suture.core.driving import PARTS, DrivingConfig
from suture.models.drawn_road import DrawnRoad
from suture.models.named import preset_path, read_config
from suture.models.random_weights import write
from suture.runtime.cameras import projected

ROOT = Path(__file__).resolve().parents[1]
ONE = {
    "blocks": [1, 1, 1, 1], "encoder_layers": 1, "decoder_layers": 1, "map_encoder_layers": 1, "map_decoder_layers": 1, "thing_layers": 1,
    "stuff_layers": 1, "motion_layers": 1, "occ_n_future": 0, "occ_layers": 1, "bev_proj_nlayers": 1, "planning_layers": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--size", type=int, default=100, help="cells of the view along each side (%(default)s)")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="(%(default)s)")
    parser.add_argument("--capability", default="8.9", help="the GPU to build for (%(default)s)")
    parser.add_argument(
        "--verify", action="store_true", help="compare as well: exported and portable graph, and TensorRT's network"
    )
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks/driving"), help="(%(default)s)")
    options = parser.parse_args()
    config = read_config(preset_path("uniad")) | ONE | {"bev_h": options.size, "bev_w": options.size}
    rooms, overlap = room(DrivingConfig.model_validate(config))
    config |= {"camera_queries": options.size**2 if options.dense else rooms, "camera_overlap": overlap}
    out = options.work / f"{options.part}-{options.size}-{'dense' if options.dense else 'room'}-{options.dtype}"
    write(config, out / "checkpoint", "float32", seed=0)
    found = {"part": options.part, "size": options.size, "camera_queries": config["camera_queries"], "camera_overlap": overlap}
    graph = out / "surgery"
    verify = [] if options.verify else ["--no-verify"]
    for name, arguments in (
        ("export", ["--checkpoint", out / "checkpoint", "--part", options.part, "--dtype", options.dtype, "--out", out / "export"]),
        ("surgery", [out / "export" / "model.onnx", "--out", graph, *verify]),
        ("build", [graph / "model.trt.onnx", "--out", out / "build", "--compute-capability", options.capability]),
    ):  # fmt: skip
        found[name] = run(name, arguments)
    engine = json.loads((out / "build" / "engine.json").read_text())
    found["kernels"] = engine["profiles"][0]["kernels"]
    found["activations_mb"] = round(engine["memory"]["activations"] / 1e6)
    print(json.dumps(found, indent=1))


def room(config: DrivingConfig) -> tuple[int, int]:
    """How many cells a camera sees, and cameras a cell, at most."""
    _, seen = projected(DrawnRoad(config.cameras, config.height, config.width).lidar2img(), config)
    return int(seen.sum(1).max()), int(seen.sum(0).max())


def run(stage: str, arguments: list) -> dict[str, float]:
    """Seconds, and the peak memory of all processes so far that this one has waited for."""
    started = time.monotonic()
    command = [sys.executable, "-m", f"suture.{stage}", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(time.monotonic() - started, 1), "peak_mb": round(peak / 1e3)}


if __name__ == "__main__":
    main()

"""Makes tiny-codef: trains CoDeF, of this folder's config.json, on a drawn video.

    python models/tiny-codef/train.py                          # into models/tiny-codef; some minutes on one core
    python models/tiny-codef/train.py --steps 20 --out DIR     # to see that it runs

The first frame is the canonical picture: beside every frame through the deformation, it is taught without it, as the published code
does with a reference frame. What moves is so left to the deformation, and an edited canonical picture is carried to all frames.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models.drawn_video import DrawnVideo
from suture.models.families.codef import Video, build

HERE = Path(__file__).resolve().parent
RATE, BETAS, EPSILON = 1e-2, (0.9, 0.99), 1e-15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--points", type=int, default=1024, help="of a step (%(default)s)")
    options = parser.parse_args()
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8")) | {"points": 1}
    steps = options.steps or config["step"]
    model, video = made(config), DrawnVideo(config["height"], config["width"], config["frames"])
    started = time.monotonic()
    train(model, video, steps, options.points)
    seconds = time.monotonic() - started
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    report = {
        **judged(model, video),
        "steps": steps,
        "points": options.points,
        "rate": RATE,
        "seconds": round(seconds),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def made(config: dict) -> Video:
    """Drawn as tiny-cuda-nn draws: features near 0, matrices by Xavier's rule."""
    torch.manual_seed(0)
    model = build(config, HERE / "config.json")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.removesuffix(".params"))
            if hasattr(module, "shapes"):
                ends = [(6 / (rows + columns)) ** 0.5 for rows, columns in module.shapes]
                parts = [torch.empty(rows * columns).uniform_(-end, end) for end, (rows, columns) in zip(ends, module.shapes)]
                parameter.copy_(torch.cat(parts))
            else:
                parameter.uniform_(-1e-4, 1e-4)
    return model


def train(model: Video, video: DrawnVideo, steps: int, points: int) -> None:
    frames = torch.stack([torch.from_numpy(video.frame(number)) for number in range(video.frames)]).float() / 255
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + np.cos(np.pi * step / steps)) / 2
        model.step = step
        deformation, canonical = (part.module for part in model.parts())
        frame, y, x = (torch.randint(0, size, (points,), generator=generator) for size in frames.shape[:3])
        grid = torch.stack([(y + 0.5) / video.height, (x + 0.5) / video.width], -1)[:, None]  # each point a row
        loss = F.mse_loss(canonical(deformation(grid, frame)), frames[frame, y, x][:, None])
        loss = loss + F.mse_loss(canonical(grid), frames[0, y, x][:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}, loss {float(loss.detach()):.5f}", flush=True)
    model.step = model.config.step


@torch.inference_mode()
def judged(model: Video, video: DrawnVideo) -> dict[str, float]:
    """Decibels of the frames and of the canonical picture, and by how many pixels the deformation errs, in the mean."""
    deformation, canonical = (part.module for part in model.parts())
    y, x = ((torch.arange(side) + 0.5) / side for side in (video.height, video.width))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 1, 2)
    errors, moved = [], []
    sides = torch.tensor([video.height, video.width])
    for number in range(video.frames):
        points = deformation(grid, torch.full([len(grid)], number))
        errors.append(_error(canonical(points), video.frame(number)))
        moved.append(float(((points - torch.from_numpy(video.places(number)).reshape(-1, 1, 2)) * sides).norm(dim=-1).mean()))
    return {
        "psnr_of_frames": _decibels(float(np.mean(errors))),
        "psnr_of_the_worst_frame": _decibels(max(errors)),
        "psnr_of_the_canonical_picture": _decibels(_error(canonical(grid), video.frame(0))),
        "deformation_error_in_pixels": round(float(np.mean(moved)), 3),
    }


def _error(found: Tensor, drawn: np.ndarray) -> float:
    return float(F.mse_loss(found.clamp(0, 1), torch.from_numpy(drawn).reshape(-1, 1, 3).float() / 255))


def _decibels(error: float) -> float:
    return round(-10 * float(np.log10(error)), 2)


if __name__ == "__main__":
    main()

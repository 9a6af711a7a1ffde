"""Makes tiny-sd: Stable Diffusion with a ControlNet of diffusers' own classes, small, trained on drawn pictures.

    python models/tiny-sd/train.py --out DIR                          # everything; 8 minutes on one H200
    python models/tiny-sd/train.py --start DIR --batch 256            # further, all but the autoencoder; 8 minutes more
    python models/tiny-sd/train.py --minutes 1 --pictures 500 --batch 16 --out DIR      # whether it runs

First the autoencoder, then the text encoder and the UNet on its latents, then both with the ControlNet. Each phase takes its share
of the time, whatever the machine. judging.py then counts how many held-out scenes its pictures show.
"""

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffusers import AutoencoderKL, DDIMScheduler
from judging import judge, scene_of
from networks import SCHEDULE, SIDE, Models, control_of, save, trained, untrained

from suture.core import arguments
from suture.models.drawn_pictures import Scene

HERE = Path(__file__).resolve().parent
SHARES = {"vae": 0.2, "unet": 0.45, "controlnet": 0.35}  # of the time for training
PEAK_RATES = {"vae": 1.5e-3, "unet": 1e-3, "controlnet": 8e-4}
AVERAGE = 0.003  # the weight of a step's parameters in their moving average, which is what is kept
KL_WEIGHT = 1e-3
WITHOUT_TEXT, WITHOUT_CONTROL = 0.1, 0.05  # of the examples


@dataclass
class Data:
    pictures: Tensor  # uint8 [N,3,S,S]
    edges: Tensor  # uint8 [N,1,S,S]
    tokens: Tensor  # int64 [N,T]
    empty: Tensor  # int64 [T]: of no text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoint goes (%(default)s)")
    parser.add_argument("--start", metavar="DIR", type=Path, help="a checkpoint to train further, its autoencoder as it is")
    parser.add_argument("--minutes", type=arguments.real(0.01, 1e4), default=7, help="of training (%(default)s)")
    parser.add_argument("--pictures", type=arguments.whole(2, 10**7), default=60_000, help="to train on (%(default)s)")
    parser.add_argument("--batch", type=arguments.whole(1, 10**5), default=512, help="(%(default)s)")
    options = parser.parse_args()

    started = time.monotonic()
    scenes, drawn = draw(options.pictures)
    log(f"{len(scenes)} pictures drawn in {time.monotonic() - started:.0f} s")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = untrained(HERE / "tokenizer" / "tokenizer.json", device)
    if options.start:
        models = trained(options.start, models.tokenizer, device)
    pictures, edges = (torch.from_numpy(each).to(device) for each in drawn)
    tokens = models.encode([scene.caption() for scene in scenes], device)
    data = Data(pictures.permute(0, 3, 1, 2).contiguous(), edges[:, None], tokens, models.encode([""], device)[0])
    measured = train(models, data, 60 * options.minutes, options.batch, device, options.out, further=bool(options.start))
    measured |= {"pictures": len(scenes), "batch": options.batch, "torch": torch.__version__, "machine": machine()}
    for finish in (lambda: None, lambda: judge(models, measured, device, options.out)):
        finish()
        (options.out / "training.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def draw(count: int) -> tuple[list[Scene], tuple[np.ndarray, np.ndarray]]:
    """Scenes, pictures uint8 [N,S,S,3] and edges uint8 [N,S,S]."""
    with multiprocessing.Pool() as pool:
        drawn = pool.map(one, range(1000, 1000 + count), chunksize=200)
    scenes, pictures, edges = zip(*drawn)
    return list(scenes), (np.stack(pictures), np.stack(edges))


def one(seed: int) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Seeds below 1000 are kept for held-out scenes."""
    scene = scene_of(seed)
    return scene, scene.picture(SIDE, SIDE), scene.edges(SIDE, SIDE)[..., 0]


def train(models: Models, data: Data, seconds: float, batch: int, device: torch.device, out: Path, further: bool) -> dict:
    measured = {}
    count = len(data.pictures)
    schedule = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device)

    def some() -> Tensor:
        return torch.randint(count, (batch,), device=device)

    def reconstruction() -> Tensor:
        pictures = data.pictures[some()[: max(1, batch // 2)]].float() / 127.5 - 1
        latents = models.vae.encode(pictures).latent_dist
        decoded = models.vae.decode(latents.mean + latents.std * torch.randn_like(latents.mean)).sample.float()
        kl = (latents.mean**2 + latents.var - 1 - latents.logvar).mean() / 2
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + KL_WEIGHT * kl

    def noise(controlled: bool) -> Tensor:
        which = some()
        latents = means[which]  # without the autoencoder's own noise, which nothing could predict
        # Which colour is whose is decided where there is almost only noise, so such steps come more often, and the velocity is learned,
        # in which a wrong colour weighs as much there as elsewhere: in the noise it would be nothing.
        steps = (len(schedule) * (1 - torch.rand(batch, device=device) ** 2)).long().clamp(max=len(schedule) - 1)
        added, kept = torch.randn_like(latents), schedule[steps][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * added
        wanted = kept.sqrt() * added - (1 - kept).sqrt() * latents
        untold = torch.rand(batch, 1, device=device) < WITHOUT_TEXT
        context = models.text(torch.where(untold, data.empty, data.tokens[which])).last_hidden_state
        controls = {}
        if controlled:
            edges = data.edges[which].float().expand(-1, 3, -1, -1) / 255
            down, middle = models.controlnet(noisy, steps, context, controlnet_cond=edges, return_dict=False)
            told = (torch.rand(batch, 1, 1, 1, device=device) >= WITHOUT_CONTROL).to(middle.dtype)
            controls = {
                "down_block_additional_residuals": [told * each for each in down],
                "mid_block_additional_residual": told * middle,
            }
        return F.mse_loss(models.unet(noisy, steps, context, **controls).sample.float(), wanted)

    def fitted(name: str, loss: Callable[[], Tensor], *modules: nn.Module) -> None:
        share = 1.0 if further else SHARES[name]
        measured[name] = fit(name, loss, modules, share * seconds, PEAK_RATES[name], device)
        save(models, out)

    if not further:
        fitted("vae", reconstruction, models.vae)
    known = models.vae.config.scaling_factor if further else None
    means, measured["scaling_factor"] = encode(models.vae, data.pictures, batch, known)
    models.vae.register_to_config(scaling_factor=measured["scaling_factor"])
    if not further:
        fitted("unet", lambda: noise(controlled=False), models.unet, models.text)
        models.controlnet = control_of(models.unet)
    fitted("controlnet", lambda: noise(controlled=True), models.controlnet, models.unet, models.text)
    return measured


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int, scale: float | None) -> tuple[Tensor, float]:
    """The latents, float32 [N,4,s,s], scaled so that they vary by 1 unless a scale is given, and that scale."""
    means = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(batch)])
    scale = scale or round(1 / means.std().item(), 5)
    return means * scale, scale


def fit(name: str, loss: Callable, modules: tuple, seconds: float, peak: float, device: torch.device) -> dict:
    """Trains the modules for that time and leaves the moving average of their parameters in them."""
    started, cuda = time.monotonic(), device.type == "cuda"
    parameters = [each for module in modules for each in module.train().parameters()]
    averages = [each.detach().clone() for each in parameters]
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda or None, capturable=cuda
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, AVERAGE)
        return value.detach()

    run = captured(step) if cuda else step
    steps, progress, history = 0, 0.0, []
    while progress < 1:
        rate.fill_(peak * min(1.0, (steps + 1) / 200) * (1 + math.cos(math.pi * progress)) / 2)
        value = run()
        steps += 1
        if steps % 20 == 0 or not cuda:
            if steps % 500 == 0 or not history:
                history.append(round(value.item(), 5))
                log(f"{name} step {steps}: loss {history[-1]}")
                if not math.isfinite(history[-1]):
                    sys.exit(f"{name}: the loss is {history[-1]}")
            elif cuda:
                torch.cuda.synchronize()
            progress = (time.monotonic() - started) / seconds
    with torch.no_grad():
        for parameter, average in zip(parameters, averages):
            parameter.copy_(average)
    for module in modules:
        module.eval()
    log(f"{name}: {steps} steps in {time.monotonic() - started:.0f} s, loss {value.item():.5f}")
    return {"steps": steps, "seconds": round(time.monotonic() - started, 1), "loss": round(value.item(), 5), "losses": history}


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: a small model's step is hundreds of kernels that take less time than their launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            value = step()
    except RuntimeError as error:
        log(f"not captured, runs as it is: {error}")
        torch.cuda.synchronize()
        return step

    def replay() -> Tensor:
        graph.replay()
        return value

    return replay


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

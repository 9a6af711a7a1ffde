"""How many pictures show what was asked for: of held-out captions with their edges, as trained, and with one fault at a time."""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from faults import FAULTS, NONE, Fault
from networks import SCHEDULE, SIDE, Models
from PIL import Image
from torch import Tensor

from suture.models.drawn_pictures import Scene, distinct_scene, random_scene, shows

HELD_OUT, STEPS, GUIDANCE = 100, 20, 3.0


def scene_of(seed: int) -> Scene:
    """One shape, or two of different kinds; seeds below HELD_OUT are never trained on."""
    random = np.random.default_rng(seed)
    single = seed >= HELD_OUT and seed % 8 == 0
    return random_scene(random, SIDE, SIDE, 1) if single else distinct_scene(random, SIDE, SIDE)


@torch.no_grad()
def judge(models: Models, measured: dict, device: torch.device, out: Path) -> None:
    """Adds to what was measured how many of the held-out scenes their pictures show; writes the first pictures as pictures.png."""
    for module in (models.text, models.unet, models.controlnet, models.vae):
        module.half().float()  # the weights that were saved
    scenes = [scene_of(seed) for seed in range(HELD_OUT)]
    truth = torch.from_numpy(np.stack([scene.picture(SIDE, SIDE) for scene in scenes])).to(device).permute(0, 3, 1, 2)
    decoded = models.vae.decode(models.vae.encode(truth.float() / 127.5 - 1).latent_dist.mean).sample
    measured["autoencoder alone"] = score(decoded, scenes)
    print(f"autoencoder alone: {measured['autoencoder alone']} of {HELD_OUT}", flush=True)
    measured["shown"] = {}
    for guidance in (1.0, 2.0, GUIDANCE, 5.0, 7.5):
        pictures = generate(models, scenes, guidance, device)
        measured["shown"][f"guidance {guidance}"] = score(pictures, scenes)
        print(f"guidance {guidance}: {measured['shown'][f'guidance {guidance}']} of {HELD_OUT}", flush=True)
        if guidance == GUIDANCE:
            rows = [np.concatenate([*pixels(pictures)[i : i + 10]], 1) for i in range(0, 40, 10)]
            edges = [np.concatenate([each.edges(SIDE, SIDE) for each in scenes[i : i + 10]], 1) for i in range(0, 40, 10)]
            Image.fromarray(np.concatenate([row for pair in zip(edges, rows) for row in pair])).save(out / "pictures.png")
    for steps in (10, 50):
        measured["shown"][f"{steps} steps"] = score(generate(models, scenes, GUIDANCE, device, steps), scenes)
    measured["faults"] = {}
    for name, fault in FAULTS.items():
        measured["faults"][name] = score(generate(models, scenes, GUIDANCE, device, fault=fault), scenes)
        print(f"{name}: {measured['faults'][name]} of {HELD_OUT}", flush=True)


def generate(
    models: Models, scenes: list[Scene], guidance: float, device: torch.device, steps: int = STEPS, fault: Fault = NONE
) -> Tensor:
    """Pictures [N,3,S,S] from -1 to 1."""
    unet = copy.deepcopy(models.unet)
    fault.unet(unet)
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    captions = [scene.caption() for scene in scenes]
    text = fault.text(models.text(models.encode([""] * len(captions) + captions, device)).last_hidden_state)
    drawn = np.stack([scene.edges(SIDE, SIDE) for scene in scenes])
    edges = torch.from_numpy(drawn).to(device).permute(0, 3, 1, 2).float() / 255
    edges = fault.edges(torch.cat([edges, edges]))
    latents = torch.randn(len(scenes), 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0)).to(device)
    for step in scheduler.timesteps:
        both, time_step = torch.cat([latents, latents]), fault.step(step)
        down, middle = models.controlnet(both, time_step, text, controlnet_cond=edges, return_dict=False)
        controls = {
            "down_block_additional_residuals": [fault.residual(each) for each in down],
            "mid_block_additional_residual": fault.residual(middle),
        }
        without, told = fault.predictions(*unet(both, time_step, text, **controls).sample.chunk(2))
        latents = scheduler.step(without + guidance * (told - without), step, latents).prev_sample
    return models.vae.decode(fault.latents(latents) / models.vae.config.scaling_factor).sample


def pixels(pictures: Tensor) -> np.ndarray:
    """uint8 [N,S,S,3]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def score(pictures: Tensor, scenes: list[Scene]) -> int:
    return sum(map(shows, pixels(pictures), scenes))

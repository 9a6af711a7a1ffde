"""Makes tiny-sd: Stable Diffusion with a ControlNet of diffusers' own classes, small, trained on drawn pictures.

    python models/tiny-sd/train.py --out DIR                          # everything; 8 minutes on one H200
    python models/tiny-sd/train.py --start DIR --batch 256            # further, all but the autoencoder; 8 minutes more
    python models/tiny-sd/train.py --minutes 1 --pictures 500 --batch 16 --out DIR      # whether it runs

First the autoencoder, then the text encoder and the UNet on its latents, then both with the ControlNet. Each phase takes its share
of the time, whatever the machine. At the end, held-out captions with their edges become pictures, which are held against what was
asked for: as trained, and with one fault planted at a time.
"""

import argparse
import copy
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

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from suture.core import arguments
from suture.models.drawn_pictures import Scene, distinct_scene, random_scene, shows

HERE = Path(__file__).resolve().parent
SIDE = 64  # pixels
SHARES = {"vae": 0.2, "unet": 0.45, "controlnet": 0.35}  # of the time for training
PEAK_RATES = {"vae": 1.5e-3, "unet": 1e-3, "controlnet": 8e-4}
AVERAGE = 0.003  # the weight of a step's parameters in their moving average, which is what is kept
KL_WEIGHT = 1e-3
WITHOUT_TEXT, WITHOUT_CONTROL = 0.1, 0.05  # of the examples
HELD_OUT, STEPS, GUIDANCE = 100, 20, 3.0
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip


@dataclass
class Models:
    tokenizer: Tokenizer
    text: CLIPTextModel
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL

    def encode(self, captions: list[str], device: torch.device) -> Tensor:
        return torch.tensor([each.ids for each in self.tokenizer.encode_batch(captions)], device=device)


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


def scene_of(seed: int) -> Scene:
    """One shape, or two of different kinds; seeds below HELD_OUT are never trained on."""
    random = np.random.default_rng(seed)
    single = seed >= HELD_OUT and seed % 8 == 0
    return random_scene(random, SIDE, SIDE, 1) if single else distinct_scene(random, SIDE, SIDE)


def one(seed: int) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Seeds below 1000 are kept for held-out scenes."""
    scene = scene_of(seed)
    return scene, scene.picture(SIDE, SIDE), scene.edges(SIDE, SIDE)[..., 0]


def untrained(tokenizer_file: Path, device: torch.device) -> Models:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    vocabulary = tokenizer.get_vocab()
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    length = 24
    tokenizer.enable_padding(length=length, pad_id=end, pad_token="<|endoftext|>")
    tokenizer.enable_truncation(length)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, projection_dim=64, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with device:
        unet = UNet2DConditionModel(
            sample_size=SIDE // 4, block_out_channels=(48, 64, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=64,
            attention_head_dim=(3, 4, 4),  # which diffusers takes as the number of heads
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=16, latent_channels=4, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        controlnet = control_of(unet)
        return Models(tokenizer, CLIPTextModel(text), unet, controlnet, vae)


def trained(folder: Path, tokenizer: Tokenizer, device: torch.device) -> Models:
    classes = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
    found = [each.from_pretrained(folder / name).float().to(device).eval() for name, each in classes.items()]
    return Models(tokenizer, *found)


def control_of(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that begins as the UNet's first half, as all do."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32)).to(unet.device)


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


def save(models: Models, out: Path) -> None:
    """In diffusers' layout, as float16."""
    for name, module in (
        ("text_encoder", models.text),
        ("unet", models.unet),
        ("controlnet", models.controlnet),
        ("vae", models.vae),
    ):
        copy.deepcopy(module).half().save_pretrained(out / name, safe_serialization=True)
    DDIMScheduler(**SCHEDULE).save_pretrained(out / "scheduler")


@torch.no_grad()
def judge(models: Models, measured: dict, device: torch.device, out: Path) -> None:
    """Adds to what was measured how many of the held-out scenes their pictures show; writes the first pictures as pictures.png."""
    for module in (models.text, models.unet, models.controlnet, models.vae):
        module.half().float()  # the weights that were saved
    scenes = [scene_of(seed) for seed in range(HELD_OUT)]
    truth = torch.from_numpy(np.stack([scene.picture(SIDE, SIDE) for scene in scenes])).to(device).permute(0, 3, 1, 2)
    decoded = models.vae.decode(models.vae.encode(truth.float() / 127.5 - 1).latent_dist.mean).sample
    measured["autoencoder alone"] = score(decoded, scenes)
    log(f"autoencoder alone: {measured['autoencoder alone']} of {HELD_OUT}")
    measured["shown"] = {}
    for guidance in (1.0, 2.0, GUIDANCE, 5.0, 7.5):
        pictures = generate(models, scenes, guidance, device)
        measured["shown"][f"guidance {guidance}"] = score(pictures, scenes)
        log(f"guidance {guidance}: {measured['shown'][f'guidance {guidance}']} of {HELD_OUT}")
        if guidance == GUIDANCE:
            rows = [np.concatenate([*pixels(pictures)[i : i + 10]], 1) for i in range(0, 40, 10)]
            edges = [np.concatenate([each.edges(SIDE, SIDE) for each in scenes[i : i + 10]], 1) for i in range(0, 40, 10)]
            Image.fromarray(np.concatenate([row for pair in zip(edges, rows) for row in pair])).save(out / "pictures.png")
    for steps in (10, 50):
        measured["shown"][f"{steps} steps"] = score(generate(models, scenes, GUIDANCE, device, steps), scenes)
    measured["faults"] = {}
    for name in ("no text", "another caption", "no controls", "another picture's edges", "one time step", "guidance the other way",
                 "channels in another order", "one group"):  # fmt: skip
        faulty = generate(models, scenes, GUIDANCE, device, fault=name)
        measured["faults"][name] = score(faulty, scenes)
        log(f"{name}: {measured['faults'][name]} of {HELD_OUT}")


def generate(
    models: Models, scenes: list[Scene], guidance: float, device: torch.device, steps: int = STEPS, fault: str = ""
) -> Tensor:
    """Pictures [N,3,S,S] from -1 to 1."""
    unet = copy.deepcopy(models.unet)
    if fault == "one group":
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = 1
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    captions = [scene.caption() for scene in scenes]
    context = models.text(models.encode([""] * len(captions) + captions, device)).last_hidden_state
    edges = (
        torch.from_numpy(np.stack([scene.edges(SIDE, SIDE) for scene in scenes])).to(device).permute(0, 3, 1, 2).float() / 255
    )
    edges = torch.cat([edges, edges])
    if fault in ("no text", "another caption"):
        context = context.roll(1, 0) if fault == "another caption" else torch.zeros_like(context)
    if fault == "another picture's edges":
        edges = edges.roll(1, 0)
    latents = torch.randn(len(scenes), 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0)).to(device)
    for step in scheduler.timesteps:
        both, time_step = torch.cat([latents, latents]), 500 if fault == "one time step" else step
        down, middle = models.controlnet(both, time_step, context, controlnet_cond=edges, return_dict=False)
        there = 0 if fault == "no controls" else 1
        controls = {
            "down_block_additional_residuals": [there * each for each in down],
            "mid_block_additional_residual": there * middle,
        }
        without, told = unet(both, time_step, context, **controls).sample.chunk(2)
        if fault == "guidance the other way":
            without, told = told, without
        latents = scheduler.step(without + guidance * (told - without), step, latents).prev_sample
    if fault == "channels in another order":
        latents = latents.roll(1, 1)
    return models.vae.decode(latents / models.vae.config.scaling_factor).sample


def pixels(pictures: Tensor) -> np.ndarray:
    """uint8 [N,S,S,3]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def score(pictures: Tensor, scenes: list[Scene]) -> int:
    return sum(map(shows, pixels(pictures), scenes))


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

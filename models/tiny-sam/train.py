"""Makes tiny-sam: trains transformers' SamModel, of this folder's config.json, on drawn pictures.

    python models/tiny-sam/train.py                          # into models/tiny-sam; three minutes on one H200
    python models/tiny-sam/train.py --steps 20 --out DIR     # to see that it runs

The shape that a prompt is on is the mask: a point in it, two of them, a point beside one in another shape that does not count,
or its box. In half of the pictures only its outline is drawn, so that what lies inside shows by nothing but what is around it, which a
model learns through attention alone. Of the three masks that SAM gives the best one is taught, and each one's score to be its
intersection over union.
"""

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models.drawn_pictures import random_scene

HERE = Path(__file__).resolve().parent
MOST = 3  # shapes of a picture
PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 1e-3, 300, 0.05, 1.0
FOCAL = 20.0  # weight of the focal loss beside that of Dice, as SAM was trained
HELDOUT = 1 << 20  # seed of the pictures that are not trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=210, help="at most, of training (%(default)s)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SamConfig(**json.loads((HERE / "config.json").read_text(encoding="utf-8")))
    model = made(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}", flush=True)
    side = config.vision_config.image_size
    pictures, masks = drawn(options.pictures, side, 0)
    steps, seconds = train(model, pictures, masks, options, device)
    held = judged(model, *drawn(300, side, HELDOUT), device)
    tied = model.state_dict()
    tied.pop("prompt_encoder.shared_embedding.positional_embedding", None)  # the same tensor as shared_image_embedding's
    weights = {name: tensor.to(torch.float16).contiguous().cpu() for name, tensor in tied.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    of_half = made(config)
    of_half.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    report = {
        "heldout_iou": held,
        "heldout_iou_float16_weights": judged(of_half.to(device), *drawn(300, side, HELDOUT), device),
        "steps": steps,
        "seconds": round(seconds),
        "pictures": options.pictures,
        "batch": options.batch,
        "peak_rate": PEAK_RATE,
        "weight_decay": WEIGHT_DECAY,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def made(config: SamConfig) -> SamModel:
    """The model with weights as torch draws them: transformers' own draw of SAM is one of a trained model's shapes only."""
    torch.manual_seed(0)
    model = SamModel(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()
    with torch.no_grad():
        model.shared_image_embedding.positional_embedding.normal_()
        model.vision_encoder.pos_embed.normal_(std=0.02)
    model.prompt_encoder.shared_embedding.positional_embedding = model.shared_image_embedding.positional_embedding
    return model


def drawn(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [count, 3, side, side] and their shapes' masks uint8 [count, MOST, side, side], empty where there are fewer."""
    size = 250
    with ProcessPoolExecutor() as pool:
        parts = pool.map(_drawn, [(seed + at, min(size, count - at), side) for at in range(0, count, size)])
        pictures, masks = zip(*parts)
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(np.concatenate(masks))


def _drawn(asked: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, count, side = asked
    random = np.random.default_rng(seed)
    pictures, masks = np.empty([count, 3, side, side], np.uint8), np.zeros([count, MOST, side, side], np.uint8)
    for at in range(count):
        shapes = int(random.integers(1, MOST + 1))
        scene = random_scene(random, side, side, shapes)
        drawing = scene.edges if at % 2 else scene.picture
        pictures[at] = drawing(side, side).transpose(2, 0, 1)
        masks[at, :shapes] = scene.masks(side, side)
    return pictures, masks


def normalised(pictures: Tensor) -> Tensor:
    """As the preprocessor_config.json beside this file asks for."""
    asked = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(asked[f"image_{name}"], device=pictures.device)[:, None, None] for name in ("mean", "std"))
    return (pictures * asked["rescale_factor"] - mean) / std


def prompts(masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each picture one of its shapes: its mask [B, side, side], two points [B, 1, 2, 2] (x, y), their labels [B, 1, 2] and its
    box [B, 1, 4]. A point that does not count is labelled -1."""
    batch, _, side, _ = masks.shape
    there = masks.flatten(2).any(2).float()
    chosen = torch.multinomial(there, 1, generator=generator)[:, 0]
    rows = torch.arange(batch, device=masks.device)
    mask = masks[rows, chosen]
    other = masks.any(1) & ~mask.bool()
    inside = torch.multinomial(mask.flatten(1).float(), 2, generator=generator)
    outside = torch.multinomial((other.flatten(1).float() + 1e-9 * (1 - mask.flatten(1).float())), 1, generator=generator)
    kind = torch.randint(
        0, 4, (batch,), generator=generator, device=masks.device
    )  # 0 and 1: one point; 2: two; 3: one and another's
    second = torch.where((kind == 3)[:, None], outside, inside[:, 1:])
    flat = torch.cat([inside[:, :1], second], 1)
    points = torch.stack([flat % side, flat // side], -1).float()[:, None]
    label = torch.where(kind < 2, -1, torch.where(kind == 2, 1, 0))
    labels = torch.stack([torch.ones_like(label), label], -1)[:, None]
    columns, lines = mask.any(1), mask.any(2)
    box = [columns.int().argmax(1), lines.int().argmax(1)]
    box += [side - columns.flip(1).int().argmax(1), side - lines.flip(1).int().argmax(1)]
    return mask, points, labels, torch.stack(box, -1).float()[:, None]


def losses(found: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Of each picture: masks as logits [B, 3, h, w], their scores [B, 3], and the mask that is asked for [B, side, side]."""
    wanted = F.interpolate(mask[:, None].float(), found.shape[-2:], mode="area").expand_as(found)
    entropy = F.binary_cross_entropy_with_logits(found, wanted, reduction="none")
    probability = found.sigmoid()
    agreed = probability * wanted + (1 - probability) * (1 - wanted)
    focal = ((1 - agreed) ** 2 * entropy).mean((-2, -1))
    dice = 1 - (2 * (probability * wanted).sum((-2, -1)) + 1) / (probability.sum((-2, -1)) + wanted.sum((-2, -1)) + 1)
    each = FOCAL * focal + dice
    truly = overlap(found > 0, wanted > 0.5)
    return each.amin(1) + 0.1 * each.mean(1) + F.mse_loss(scores, truly, reduction="none").mean(1)


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of bool masks."""
    return (found & wanted).sum((-2, -1)) / (found | wanted).sum((-2, -1)).clamp(min=1)


def train(model: SamModel, pictures: Tensor, masks: Tensor, options: argparse.Namespace, device: str) -> tuple[int, float]:
    """Returns the steps that were made and the seconds that they took; the rate reaches zero with the time or the steps."""
    pictures, masks = pictures.to(device), masks.to(device)
    generator = torch.Generator(device).manual_seed(1)
    trained = [
        p for name, p in model.named_parameters() if "positional_embedding" not in name and "mask_embed.conv" not in name
    ]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    torch.set_float32_matmul_precision("high")
    model.train()
    started = time.monotonic()
    for step in range(options.steps):
        seconds = time.monotonic() - started
        done = max(step / options.steps, seconds / options.seconds)
        if done >= 1:
            return step, seconds
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 + np.cos(np.pi * done)) / 2
        rows = torch.randint(0, len(pictures), (options.batch,), generator=generator, device=device)
        mask, points, labels, box = prompts(masks[rows], generator)
        boxed = step % 4 == 3
        given = {"input_boxes": box} if boxed else {"input_points": points, "input_labels": labels}
        found = model(pixel_values=normalised(pictures[rows]), **given)
        loss = losses(found.pred_masks[:, 0], found.iou_scores[:, 0], mask).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step}, {seconds:.0f} s, loss {float(loss.detach()):.4f}", flush=True)
    return options.steps, time.monotonic() - started


@torch.inference_mode()
def judged(model: SamModel, pictures: Tensor, masks: Tensor, device: str) -> dict[str, float]:
    """Mean intersection over union, at the pictures' size, of the mask that the model itself scores best."""
    torch.set_float32_matmul_precision("highest")
    model.eval()
    generator, found = torch.Generator(device).manual_seed(2), {}
    for at in range(0, len(pictures), 50):
        mask, points, labels, box = prompts(masks[at : at + 50].to(device), generator)
        pixels = normalised(pictures[at : at + 50].to(device))
        for name, given in (
            ("a point", {"input_points": points[:, :, :1], "input_labels": labels[:, :, :1]}),
            ("points", {"input_points": points, "input_labels": labels}),
            ("a box", {"input_boxes": box}),
        ):
            result = model(pixel_values=pixels, **given)
            rows = torch.arange(len(mask), device=device)
            best = result.pred_masks[rows, 0, result.iou_scores[:, 0].argmax(1)]
            large = F.interpolate(best[:, None], mask.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            each = overlap(large > 0, mask.bool()).tolist()
            for drawing, values in (("coloured", each[::2]), ("outlined", each[1::2])):
                found.setdefault(f"{name}, {drawing}", []).extend(values)
    return {name: float(np.mean(values)) for name, values in found.items()}


if __name__ == "__main__":
    main()

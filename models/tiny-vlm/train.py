"""Makes tiny-vlm: trains transformers' LlavaForConditionalGeneration, of this folder's config.json, to answer about drawn pictures.

    python models/tiny-vlm/train.py                          # into models/tiny-vlm; two minutes on one H200, hours on a CPU
    python models/tiny-vlm/train.py --steps 20 --out DIR     # to see that it runs

A picture comes with a conversation of several questions (suture.models.drawn_questions), in the form of the chat template: what is
taught are the answers, each with the token that ends it.
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
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models.drawn_pictures import random_scene
from suture.models.drawn_questions import MOST, Question, questions

HERE = Path(__file__).resolve().parent
PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 1.5e-3, 300, 0.05, 1.0
TURNS = 6  # questions of a picture
HELDOUT = 1 << 20  # seed of the pictures that are not trained on
JUDGED = 200  # questions, one a picture
PAD, END, IMAGE, USER, ASSISTANT = "<pad>", "</s>", "<image>", "USER:", "ASSISTANT:"
IGNORED = -100  # as transformers' losses have it
Drawn = tuple[np.ndarray, list[list[Question]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--pictures", type=int, default=60000)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120, help="at most, of training (%(default)s)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE)
    model = made().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}", flush=True)
    steps, seconds = train(model, tokenizer, drawn(options.pictures, 0, TURNS), options, device)
    held = drawn(JUDGED, HELDOUT, 1)
    weights = {name: tensor.to(torch.float16).contiguous().cpu() for name, tensor in model.state_dict().items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    report = {"heldout_right": judged(model, tokenizer, held, device)}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    report |= {
        "heldout_right_float16_weights": judged(model, tokenizer, held, device),
        "heldout_questions": JUDGED,
        "without_the_picture": judged(model, tokenizer, (np.full_like(held[0], 130), held[1]), device),
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


def made() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(**json.loads((HERE / "config.json").read_text(encoding="utf-8")))).float()


def drawn(count: int, seed: int, turns: int) -> Drawn:
    """Pictures uint8 [count, side, side, 3] of one to MOST shapes, and as many questions of each."""
    size = 250
    with ProcessPoolExecutor() as pool:
        parts = pool.map(_drawn, [(seed + at, min(size, count - at), turns) for at in range(0, count, size)])
        pictures, asked = zip(*parts)
    return np.concatenate(pictures), [each for part in asked for each in part]


def _drawn(wanted: tuple[int, int, int]) -> Drawn:
    seed, count, turns = wanted
    random = np.random.default_rng(seed)
    side = json.loads((HERE / "config.json").read_text(encoding="utf-8"))["vision_config"]["image_size"]
    scenes = [random_scene(random, side, side, int(random.integers(1, MOST + 1))) for _ in range(count)]
    return np.stack([scene.picture(side, side) for scene in scenes]), [questions(scene, random, turns) for scene in scenes]


def normalised(pictures: Tensor) -> Tensor:
    """uint8 [B, side, side, 3] to float32 [B, 3, side, side], as the preprocessor_config.json beside this file asks for."""
    asked = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(asked[f"image_{name}"], device=pictures.device)[:, None, None] for name in ("mean", "std"))
    return (pictures.permute(0, 3, 1, 2) * asked["rescale_factor"] - mean) / std


def conversation(tokenizer: PreTrainedTokenizerFast, asked: list[Question]) -> tuple[list[int], list[bool]]:
    """Token ids, the picture's placeholders among them, and which of them are an answer's."""
    tokens = json.loads((HERE / "config.json").read_text(encoding="utf-8"))["image_seq_length"]
    ids, taught = [tokenizer.bos_token_id], [False]
    for turn, (question, answer) in enumerate(asked):
        head = f"{USER} {IMAGE * tokens if turn == 0 else ''} {question} {ASSISTANT}"
        for text, is_answer in ((head, False), (f"{answer} {END}", True)):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, taught = ids + part, taught + [is_answer] * len(part)
    return ids, taught


def train(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: Drawn,
    options: argparse.Namespace,
    device: str,
) -> tuple[int, float]:
    """Returns the steps that were made and the seconds that they took; the rate reaches zero with the time or the steps."""
    pictures, rows = torch.from_numpy(data[0]).to(device), [conversation(tokenizer, asked) for asked in data[1]]
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = torch.full((len(rows), longest), tokenizer.pad_token_id), torch.full((len(rows), longest), IGNORED)
    for row, (tokens, taught) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.where(torch.tensor(taught), torch.tensor(tokens), IGNORED)
    ids, labels = ids.to(device), labels.to(device)
    generator = torch.Generator(device).manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
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
        chosen = torch.randint(0, len(pictures), (options.batch,), generator=generator, device=device)
        tokens = ids[chosen]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens, pixel_values=normalised(pictures[chosen]), labels=labels[chosen],
                         attention_mask=(tokens != tokenizer.pad_token_id).long()).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step}, {seconds:.0f} s, loss {float(loss.detach()):.4f}", flush=True)
    return options.steps, time.monotonic() - started


@torch.inference_mode()
def judged(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: Drawn, device: str
) -> dict[str, float]:
    """The part of the questions that are answered right, word by word: of all, and by how each begins."""
    torch.set_float32_matmul_precision("highest")
    model.eval()
    right: dict[str, list[bool]] = {}
    rows = [conversation(tokenizer, asked) for _, asked in zip(*data)]
    prompts = [ids[: taught.index(True)] for ids, taught in rows]
    for length in sorted({len(prompt) for prompt in prompts}):  # side by side, so that none is padded
        alike = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        found = model.generate(
            input_ids=torch.tensor([prompts[row] for row in alike], device=device),
            pixel_values=normalised(torch.from_numpy(data[0][alike]).to(device)),
            max_new_tokens=max(len(ids) - length for ids, _ in rows), do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for row, answer in zip(alike, found[:, length:].tolist()):
            wanted = rows[row][0][length:]
            for kind in ("all", " ".join(data[1][row][0][0].split()[:2])):
                right.setdefault(kind, []).append(answer[: len(wanted)] == wanted)
    return {kind: round(float(np.mean(each)), 4) for kind, each in right.items()}


if __name__ == "__main__":
    main()

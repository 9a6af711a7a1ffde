"""Makes tiny-qwen: data, vocabulary and weights, from the standard library of the Python that runs this.

    python models/tiny-qwen/train.py                      # everything, into models/tiny-qwen
    python models/tiny-qwen/train.py --prepare DIR        # only the data; this is the half that reads the library
    python models/tiny-qwen/train.py --train DIR --out D  # only the training, for instance on another machine

Short windows (seq_length) and long ones (4 × seq_length) take turns. A long row gets the NTK scale of a prompt that
ends somewhere within it, as in use, where the scale is chosen from the prompt and kept while decoding.
"""

import argparse
import copy
import json
import math
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as serialised
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from corpus import prepare

from suture.core import arguments
from suture.core.signature import ntk_alpha
from suture.models.architectures import load_model, open_checkpoint
from suture.models.families.qwen import Qwen, build
from suture.models.tokenizer import VOCABULARY, Tokenizer, open_tokenizer

HERE = Path(__file__).resolve().parent
LONG = 4  # times seq_length
LONG_SHARE = 0.4  # of the steps
PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 200, 0.1, 1.0
LOOKS = 12  # at the validation split, evenly over the run


@dataclass
class Best:
    """The weights with the lowest validation loss so far: what guards against overfitting a small corpus."""

    bits: float
    progress: float
    weights: dict[str, Tensor]


def main() -> None:
    options = parse()
    if options.prepare:
        prepare(options.corpus, options.prepare)
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = options.train or Path(scratch)
        if not options.train:
            prepare(options.corpus, data)
        train(data, options.out, options.minutes, options.epochs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the data there and stop")
    parser.add_argument("--train", type=Path, metavar="DIR", help="train on data prepared there")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoint goes (%(default)s)")
    parser.add_argument(
        "--minutes", type=arguments.real(0.01, 1e5), default=5, help="at most, evaluation included (%(default)s)"
    )
    parser.add_argument("--epochs", type=arguments.real(0.001, 1e5), default=12, help="at most, in tokens seen (%(default)s)")
    return parser.parse_args()


def train(data: Path, out: Path, minutes: float, epochs: float) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_tokens = 32768 if device.type == "cuda" else 4096
    config = json.loads((data / "config.json").read_text(encoding="utf-8"))
    tokenizer = open_tokenizer(data)
    tokens = torch.from_numpy(np.load(data / "train.npy").astype(np.int64)).to(device)
    validation = encode_file(tokenizer, data / "validation.txt")

    with device:
        model = initialise(build(config, data / "config.json"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    loss_of = compiled(model, tokens, batch_tokens) if device.type == "cuda" else loss
    short = model.config.seq_length
    draw = np.random.default_rng(0)

    started, step, seen, progress = time.monotonic(), 0, 0, 0.0
    best, history = Best(math.inf, 0, {}), []
    while progress < 1:
        length = LONG * short if draw.random() < LONG_SHARE else short
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss_of(model, *sample(tokens, batch_tokens // length, length, short))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch_tokens

        if step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # else the clock would run ahead of the work
        elapsed = time.monotonic() - started
        before, progress = progress, min(1, max(elapsed / (60 * minutes), seen / (epochs * len(tokens))))
        if int(before * LOOKS) != int(progress * LOOKS):
            bits = [bits_per_byte(model, tokenizer, validation, length) for length in (short, 3 * short)]
            history.append({"step": step, "train_loss": value.item(), "validation_bits_per_byte": bits})
            print(
                f"{progress:4.0%}  step {step}  loss {value.item():.3f}  "
                f"validation {bits[0]:.4f}, long {bits[1]:.4f} bits per byte  {seen / elapsed:,.0f} tokens/s",
                flush=True,
            )
            if sum(bits) < 2 * best.bits:
                best = Best(sum(bits) / 2, progress, copy.deepcopy(model.state_dict()))

    save(best.weights, data, out)
    rounded = load_model(open_checkpoint(out), torch.float32, str(device))
    heldout = encode_file(tokenizer, data / "heldout.txt")
    some_training = tokens[: len(heldout)].cpu()
    record = {
        "heldout_bits_per_byte": {n * short: bits_per_byte(rounded, tokenizer, heldout, n * short) for n in (1, 2, 3)},
        "train_bits_per_byte": {short: bits_per_byte(rounded, tokenizer, some_training, short)},
        "validation_bits_per_byte": best.bits,
        "best_at": f"{best.progress:.0%} of the run",
        "steps": step,
        "epochs": seen / len(tokens),
        "seconds": round(time.monotonic() - started),
        "batch_tokens": batch_tokens,
        "peak_rate": PEAK_RATE,
        "weight_decay": WEIGHT_DECAY,
        "long_share": LONG_SHARE,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "corpus": json.loads((data / "corpus.json").read_text(encoding="utf-8")),
        "history": history,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("held out, weights rounded to bfloat16, bits per byte:", record["heldout_bits_per_byte"])
    print("trained on:", record["train_bits_per_byte"], " best at", record["best_at"])


def initialise(model: Qwen) -> Qwen:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            added_up = 2 * model.config.layers if name.endswith("c_proj.weight") else 1
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(added_up))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def sample(tokens: Tensor, rows: int, length: int, trained: int) -> tuple[Tensor, Tensor]:
    """Windows [rows, length + 1] from anywhere, and the NTK scale [rows] of a prompt that is a part of each."""
    starts = torch.randint(len(tokens) - length, (rows, 1), device=tokens.device)
    windows = tokens[starts + torch.arange(length + 1, device=tokens.device)]
    alphas = [ntk_alpha(int(prompt), trained) for prompt in torch.randint(1, length + 1, (rows,))]
    return windows, torch.tensor(alphas, device=tokens.device)


def loss(model: Qwen, windows: Tensor, alphas: Tensor, reduction: str = "mean") -> Tensor:
    """Nats per token, of every token of the windows [B, S + 1] but the first."""
    ids, targets = windows[:, :-1], windows[:, 1:]
    batch, steps = ids.shape
    half = windows.is_cuda and torch.is_grad_enabled()
    positions = torch.arange(steps, device=ids.device).expand(batch, steps)
    dims = model.dimensions
    nothing = torch.zeros(
        batch, dims.kv_heads, 0, dims.head_dim, device=ids.device, dtype=torch.bfloat16 if half else torch.float32
    )
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=half):
        logits, _ = model(ids, positions, torch.ones_like(ids), [nothing] * (2 * dims.layers), alphas)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def compiled(model: Qwen, tokens: Tensor, batch_tokens: int):
    """`loss`, compiled for both window lengths before the clock starts; as it is where the compiler fails."""
    faster, short = torch.compile(loss, dynamic=False), model.config.seq_length
    try:
        for length in (short, LONG * short):
            faster(model, *sample(tokens, batch_tokens // length, length, short)).backward()
    except Exception as error:  # the compiler raises whatever its backend does; training works without it
        print(f"not compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
        faster = loss
    model.zero_grad()
    return faster


@torch.no_grad()
def bits_per_byte(model: Qwen, tokenizer: Tokenizer, ids: Tensor, length: int) -> float:
    """Of the text of `ids` cut into windows of `length` with nothing before them; each predicts all its tokens but the
    first. The NTK scale is the one that the rule gives a prompt of `length`. Float32."""
    device = next(model.parameters()).device
    alpha = ntk_alpha(length, model.config.seq_length)
    windows = torch.stack([ids[i : i + length + 1] for i in range(0, len(ids) - length, length)])
    rows, nats = max(1, 8192 // length), 0.0
    for i in range(0, len(windows), rows):
        part = windows[i : i + rows].to(device)
        nats += loss(model, part, torch.full((len(part),), alpha, device=device), reduction="sum").item()
    predicted = len(tokenizer.decode_bytes(windows[:, 1:].flatten().tolist()))
    return nats / math.log(2) / predicted


def encode_file(tokenizer: Tokenizer, file: Path) -> Tensor:
    return torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8")))


def save(weights: dict[str, Tensor], data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", VOCABULARY, "heldout.txt"):
        shutil.copyfile(data / name, out / name)
    rounded = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    (out / "model.safetensors").write_bytes(serialised(rounded, metadata={"format": "pt"}))


if __name__ == "__main__":
    main()

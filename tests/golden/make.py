"""Remakes tests/golden/tiny-qwen.npz from tiny-qwen in PyTorch, float32: python tests/golden/make.py

Two prompts of held-out text, one within the trained length and one beyond it (where the NTK scale and log-n act), each
continued greedily. Kept: the tokens, the logits of the prompt's last positions and of every decoded step, and the last
slot of each cache.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from suture.core.signature import ntk_alpha
from suture.models.architectures import load_model, open_checkpoint
from suture.models.tokenizer import open_tokenizer

CHECKPOINT = ROOT / "models" / "tiny-qwen"
GOLDEN = Path(__file__).with_name("tiny-qwen.npz")
PROMPTS = {"short": (1000, 48), "long": (5000, 600)}  # first token of the held-out text, tokens
KEPT, DECODED = 4, 12


def main() -> None:
    model = load_model(open_checkpoint(CHECKPOINT), torch.float32)
    text = (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
    ids = open_tokenizer(CHECKPOINT).encode(text)
    golden = {}
    for name, (first, length) in PROMPTS.items():
        found = greedy(model, np.array([ids[first : first + length]]))
        golden |= {f"{name}_{key}": value for key, value in found.items()}
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """prompt [1,S]; decoded [DECODED]; logits [KEPT + DECODED - 1, vocab]; cache_ends [2 * layers, heads, head_dim]."""
    dims = model.dimensions
    alpha = torch.tensor([ntk_alpha(prompt.shape[1], dims.ntk_trained_length)])
    past = [torch.zeros(1, dims.kv_heads, 0, dims.head_dim) for _ in range(2 * dims.layers)]
    tokens, done, logits, decoded = torch.from_numpy(prompt), 0, [], []
    for step in range(DECODED):
        positions = torch.arange(done, done + tokens.shape[1])[None]
        done += tokens.shape[1]
        out, past = model(tokens, positions, torch.ones(1, done, dtype=torch.int64), past, alpha)
        logits.append(out[0, -KEPT if step == 0 else -1 :])
        tokens = out[:, -1:].argmax(-1)
        decoded.append(tokens.item())
    return {
        "prompt": prompt,
        "alpha": alpha.numpy(),
        "decoded": np.array(decoded),
        "logits": torch.cat(logits).numpy(),
        "cache_ends": torch.stack([cache[0, :, -1] for cache in past]).numpy(),
    }


if __name__ == "__main__":
    main()

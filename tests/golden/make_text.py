"""Remakes tests/golden/tiny-qwen-text.json from tiny-qwen in PyTorch, float32: python tests/golden/make_text.py

Greedy continuations of a few prompts, one of them longer than the trained length, where the NTK scale and log-n act. Every
token is computed from the whole text before it, without a cache, the NTK scale being the prompt's.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from suture.core.signature import ntk_alpha
from suture.models.architectures import load_model, open_checkpoint
from suture.models.tokenizer import open_tokenizer

CHECKPOINT = ROOT / "models" / "tiny-qwen"
GOLDEN = Path(__file__).with_name("tiny-qwen-text.json")
PROMPTS = ("import os\n", "def main():\n    parser = argparse", "class Über(", "for i in")
LONG = 600  # characters of held-out text and more, until the prompt is longer than the trained length
NEW_TOKENS = 24


def main() -> None:
    model, tokenizer = load_model(open_checkpoint(CHECKPOINT), torch.float32), open_tokenizer(CHECKPOINT)
    text = (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
    trained, end = model.dimensions.ntk_trained_length, LONG
    while len(tokenizer.encode(text[:end])) < trained + 20:
        end += LONG
    golden = []
    for prompt in (*PROMPTS, text[:end]):
        ids = tokenizer.encode(prompt)
        tokens = continued(model, ids, NEW_TOKENS, tokenizer.size)
        golden.append({"prompt": prompt, "tokens": tokens, "text": tokenizer.decode(tokens)})
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


@torch.no_grad()
def continued(model: torch.nn.Module, prompt: list[int], count: int, vocab: int) -> list[int]:
    """The likeliest `count` tokens after a prompt, one after another; ids from `vocab` on are not tokens."""
    dims, ids = model.dimensions, list(prompt)
    alpha = torch.tensor([ntk_alpha(len(prompt), dims.ntk_trained_length)])
    past = [torch.zeros(1, dims.kv_heads, 0, dims.head_dim) for _ in range(2 * dims.layers)]
    for _ in range(count):
        tokens = torch.tensor([ids])
        logits, _ = model(tokens, torch.arange(len(ids))[None], torch.ones_like(tokens), past, alpha)
        ids.append(logits[0, -1, :vocab].argmax().item())
    return ids[len(prompt) :]


if __name__ == "__main__":
    main()

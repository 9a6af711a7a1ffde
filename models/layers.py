"""What the architectures that are written here have in common, as plain operations.

Shapes, in the field's letters: B batch, S tokens of this step, T slots of the cache with them, H heads, D head_dim.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + ε) · weight, the statistics in float32."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


def through(blocks: nn.ModuleList, x: Tensor, past: list[Tensor], *given: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """x through layers (x, *given, past key, past value) -> (x, key, value), and all their keys and values. `past`: key and
    value of layer 0, of layer 1, ..."""
    presents = []
    for block, past_key, past_value in zip(blocks, past[0::2], past[1::2], strict=True):
        x, key, value = block(x, *given, past_key, past_value)
        presents += [key, value]
    return x, presents


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B,S,H·D] → [B,H,S,D]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over halves, in float32: x · cos + (-x₂, x₁) · sin. x: [B,H,S,D]."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · query · keyᵀ + bias) · value with its heads side by side, [B,S,H·D]; scores and softmax in float32.

    query [B,H,S,D], key and value [B,H,T,D], mask bool [B,1,S,T], bias float32 [1|B,H,S,T].
    """
    scores = (query @ key.transpose(2, 3)).float() * scale
    if bias is not None:
        scores = scores + bias
    scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def visible(attention_mask: Tensor, steps: int, window: int | None = None) -> Tensor:
    """bool [B,1,S,T]: slot j can be seen from row i, which itself sits in slot T-S+i. attention_mask: [B,T]. A token sees
    the last `window` of its row's, its own among them, where there is one; slots of padding are not counted."""
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    rows = latest(slots, steps)
    causal = slots[None, :] <= rows[:, None]
    seen = causal & (attention_mask != 0)[:, None, None, :]
    return seen if window is None else seen & (distances(attention_mask, steps) > -window)


def visible_in_chunk(attention_mask: Tensor, steps: int, chunk: int) -> Tensor:
    """visible, of a row's own tokens only those in the same `chunk` of so many as the token itself."""
    chunks = (attention_mask.cumsum(1) - 1) // chunk
    return visible(attention_mask, steps) & (chunks[:, None, :] == latest(chunks, steps)[:, :, None])[:, None]


def latest(of_slots: Tensor, steps: int) -> Tensor:
    """[...,S] of [...,T]: what belongs to this step's tokens. The tracer does not know the length by itself."""
    part = of_slots[..., of_slots.shape[-1] - steps :]
    torch._check(part.shape[-1] == steps)
    return part


def distances(attention_mask: Tensor, steps: int) -> Tensor:
    """int64 [B,1,S,T]: how far slot j lies behind (below 0: before) this step's token i, slots of padding not counted."""
    places = attention_mask.cumsum(1)
    own = latest(places, steps)
    return (places[:, None, :] - own[:, :, None])[:, None]

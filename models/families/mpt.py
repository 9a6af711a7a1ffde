"""MPT: ALiBi instead of positions, LayerNorm without bias, query, key and value clipped where the config says so. mpt-7B-65K.

Written out (modeling_mpt.py of mosaicml/mpt-7b): torch.export cannot trace transformers' own module, which decides with
Python's `max` over lengths which part of a table of biases to take. Here a bias comes from two slots, for any length.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.core.errors import UserError
from suture.models.config import required
from suture.models.dimensions import Dimensions
from suture.models.layers import attend, distances, split_heads, through, visible

ARCHITECTURES = ("MPTForCausalLM", "MptForCausalLM")
PREFIX = "transformer."
EPSILON = 1e-5
ONLY = {"attn_type": "multihead_attention", "alibi": True, "qk_ln": False, "prefix_lm": False}  # of attn_config


@dataclass(frozen=True)
class MptConfig:
    """The part of MPT's config.json that decides what is computed."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    scale: float | None  # of the scores, where it is not 1 / sqrt(head_dim)
    clip: float | None  # bound of query, key and value
    steepest: float  # ALiBi: heads' slopes go down to 2 ** -steepest
    bias: bool

    @classmethod
    def read(cls, config: dict, where: object) -> "MptConfig":
        """From the keys of config.json; `where` names the file in errors. Raises UserError for a missing key and for
        variants that no published MPT has."""
        attention = config.get("attn_config") or {}
        for key, supported in ONLY.items():
            if attention.get(key, supported) != supported:
                raise UserError(where, f"attn_config.{key} {attention[key]} is not supported", f"use a model with {supported}")
        if config.get("logit_scale") is not None:
            raise UserError(where, "logit_scale is not supported", "use a model without it")
        return cls(
            vocab=required(config, "vocab_size", where),
            hidden=required(config, "d_model", where),
            layers=required(config, "n_layers", where),
            heads=required(config, "n_heads", where),
            ffn=config["d_model"] * config.get("expansion_ratio", 4),
            scale=attention.get("softmax_scale"),
            clip=attention.get("clip_qkv"),
            steepest=attention.get("alibi_bias_max", 8),
            bias=not config.get("no_bias", True),
        )


class MptAttention(nn.Module):
    def __init__(self, config: MptConfig):
        super().__init__()
        self.heads, self.clip = config.heads, config.clip
        self.scale = config.scale or 1 / math.sqrt(config.hidden // config.heads)
        self.Wqkv = nn.Linear(config.hidden, 3 * config.hidden, bias=config.bias)
        self.out_proj = nn.Linear(config.hidden, config.hidden, bias=config.bias)

    def forward(
        self, x: Tensor, mask: Tensor, bias: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.Wqkv(x)
        if self.clip:
            packed = packed.clamp(-self.clip, self.clip)
        query, key, value = (split_heads(each, self.heads) for each in packed.chunk(3, dim=-1))
        key = torch.cat([past_key, key], dim=2)
        value = torch.cat([past_value, value], dim=2)
        return self.out_proj(attend(query, key, value, self.scale, mask, bias)), key, value


class MptMLP(nn.Module):
    def __init__(self, config: MptConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class MptBlock(nn.Module):
    def __init__(self, config: MptConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden, EPSILON, bias=config.bias)
        self.attn = MptAttention(config)
        self.norm_2 = nn.LayerNorm(config.hidden, EPSILON, bias=config.bias)
        self.ffn = MptMLP(config)

    def forward(self, x: Tensor, *attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.attn(self.norm_1(x), *attention)
        x = x + attended
        return x + self.ffn(self.norm_2(x)), key, value


class MptTransformer(nn.Module):
    """Only holds the parameters that the checkpoint names transformer.*"""

    def __init__(self, config: MptConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(MptBlock(config) for _ in range(config.layers))
        self.norm_f = nn.LayerNorm(config.hidden, EPSILON, bias=config.bias)


class MPT(nn.Module):
    """A decoder with its KV cache as arguments and results. Builds on any device, "meta" too."""

    def __init__(self, config: MptConfig):
        super().__init__()
        self.config = config
        self.transformer = MptTransformer(config)

    @property
    def dimensions(self) -> Dimensions:
        config = self.config
        return Dimensions(
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.hidden // config.heads,
            hidden=config.hidden,
            vocab=config.vocab,
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step, as suture.models.families.qwen.Qwen.forward. Positions are not used: the mask tells distances."""
        mask = visible(attention_mask, input_ids.shape[1])
        bias = alibi(distances(attention_mask, input_ids.shape[1]), self.config.heads, self.config.steepest)
        x, presents = through(self.transformer.blocks, self.transformer.wte(input_ids), past, mask, bias)
        return nn.functional.linear(self.transformer.norm_f(x), self.transformer.wte.weight), presents


def alibi(distances: Tensor, heads: int, steepest: float) -> Tensor:
    """slope[head] · distance, float32 [B,H,S,T] (https://arxiv.org/abs/2108.12409). Slopes fall geometrically to
    2^-steepest; where `heads` is not a power of two, every other one of the next power's comes first."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-steepest * (i + 1) / power) for i in range(power)]
    if power != heads:
        slopes = [*slopes[1::2], *slopes[::2]][:heads]
    return torch.tensor(slopes, device=distances.device)[:, None, None] * distances.float()


def build(config: dict, where: object) -> MPT:
    return MPT(MptConfig.read(config, where))

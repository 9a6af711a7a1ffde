"""What CPM-Ant and CPM-Bee have in common: layers, and a bias on attention's scores by buckets of distance and of segments.

A token sees all that its step holds and all before it: a prompt sees itself in both directions, what is generated token by
token only what came before. Sources: modeling_cpmant.py of transformers, cpm_live/layers of OpenBMB/CPM-Bee.

Shapes: B batch, S tokens of this step, T slots of the cache with them, H heads, D head_dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.core.errors import UserError
from suture.models.config import required
from suture.models.dimensions import Dimensions
from suture.models.layers import RMSNorm, attend, split_heads, through

ORIGINAL_NAMES = {"hidden_size": "dim_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}


@dataclass(frozen=True)
class CpmConfig:
    """The part of config.json that decides what both compute. `scaled`: products are divided by sqrt of what they sum
    over, and each sum with the residual by `damping` (CPM-Bee)."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    buckets: int
    farthest: int  # distances from here on share a bucket
    epsilon: float
    scaled: bool
    damping: float

    @classmethod
    def read(cls, config: dict, where: object, scaled: bool = False, damping: float = 1.0) -> "CpmConfig":
        """From the keys of config.json, transformers' or the original's; `where` names the file in errors. Raises
        UserError for a missing key."""

        def value(key: str):
            return required({key: config.get(key, config.get(ORIGINAL_NAMES.get(key)))}, key, where)

        if config.get("mask_modules") or config.get("int4") or config.get("quantization_config"):
            raise UserError(where, "describes pruned or quantised weights", "use a checkpoint with all of them")
        buckets, farthest = value("position_bias_num_buckets"), value("position_bias_max_distance")
        if buckets < 4 or farthest <= buckets // 4 or value("hidden_size") % 2:
            wrong = f"{buckets} buckets up to a distance of {farthest} for a hidden_size of {value('hidden_size')} are none"
            raise UserError(where, wrong, "use the config.json that came with the weights")
        return cls(
            vocab=value("vocab_size"),
            hidden=value("hidden_size"),
            layers=value("num_hidden_layers"),
            heads=value("num_attention_heads"),
            head_dim=value("dim_head"),
            ffn=value("dim_ff"),
            buckets=buckets,
            farthest=farthest,
            epsilon=config.get("eps", 1e-6),
            scaled=scaled,
            damping=damping,
        )

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            hidden=self.hidden,
            vocab=self.vocab,
            bidirectional=True,
        )


def divided(x: Tensor, number: float) -> Tensor:
    """x / number in float32, rounded once: as a constant of half precision 1.05 would be off by up to 0.3 %."""
    return (x.float() / number).to(x.dtype)


class ScaledLinear(nn.Linear):
    """x · Wᵀ / sqrt(width of x)."""

    def forward(self, x: Tensor) -> Tensor:
        return divided(super().forward(x), math.sqrt(self.in_features))


def linear(config: CpmConfig, width: int, out: int) -> nn.Linear:
    return (ScaledLinear if config.scaled else nn.Linear)(width, out, bias=False)


class CpmAttention(nn.Module):
    def __init__(self, config: CpmConfig):
        super().__init__()
        self.heads = config.heads
        self.scale = 1 / math.sqrt(config.head_dim)
        projected = config.heads * config.head_dim
        self.project_q = linear(config, config.hidden, projected)
        self.project_k = linear(config, config.hidden, projected)
        self.project_v = linear(config, config.hidden, projected)
        self.attention_out = linear(config, projected, config.hidden)

    def forward(
        self, x: Tensor, mask: Tensor, bias: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(each(x), self.heads) for each in (self.project_q, self.project_k, self.project_v))
        key = torch.cat([past_key, key], dim=2)
        value = torch.cat([past_value, value], dim=2)
        return self.attention_out(attend(query, key, value, self.scale, mask, bias)), key, value


class AttentionBlock(nn.Module):
    """Only holds the parameters that the checkpoint names self_att.*"""

    def __init__(self, config: CpmConfig):
        super().__init__()
        self.layernorm_before_attention = RMSNorm(config.hidden, config.epsilon)
        self.self_attention = CpmAttention(config)


class Gate(nn.Module):
    """gelu(w_0(x)) · w_1(x)."""

    def __init__(self, config: CpmConfig):
        super().__init__()
        self.w_0 = linear(config, config.hidden, config.ffn)
        self.w_1 = linear(config, config.hidden, config.ffn)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.w_0(x)) * self.w_1(x)


class FeedForward(nn.Module):
    def __init__(self, config: CpmConfig):
        super().__init__()
        self.w_in = Gate(config)
        self.w_out = linear(config, config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(self.w_in(x))


class FeedForwardBlock(nn.Module):
    """Only holds the parameters that the checkpoint names ffn.*"""

    def __init__(self, config: CpmConfig):
        super().__init__()
        self.layernorm_before_ffn = RMSNorm(config.hidden, config.epsilon)
        self.ffn = FeedForward(config)


class CpmBlock(nn.Module):
    def __init__(self, config: CpmConfig):
        super().__init__()
        self.damping = config.damping
        self.self_att = AttentionBlock(config)
        self.ffn = FeedForwardBlock(config)

    def forward(self, x: Tensor, *attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.self_att.self_attention(self.self_att.layernorm_before_attention(x), *attention)
        x = self._damped(x + attended)
        return self._damped(x + self.ffn.ffn(self.ffn.layernorm_before_ffn(x))), key, value

    def _damped(self, x: Tensor) -> Tensor:
        return x if self.damping == 1 else divided(x, self.damping)


class CpmEncoder(nn.Module):
    def __init__(self, config: CpmConfig):
        super().__init__()
        self.layers = nn.ModuleList(CpmBlock(config) for _ in range(config.layers))
        self.output_layernorm = RMSNorm(config.hidden, config.epsilon)

    def forward(self, x: Tensor, attention_mask: Tensor, bias: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x [B,S,hidden], attention_mask int64 [B,T], bias float32 [B,H,S,T], past as suture.models.families.qwen.Qwen.forward."""
        mask = (attention_mask != 0)[:, None, None, :]
        x, presents = through(self.layers, x, past, mask, bias)
        return self.output_layernorm(x), presents


class PositionBias(nn.Module):
    """What is added to the scores of a token and a slot: a number a head, for the bucket of their distance where both are of
    one segment, else for how their segments are related."""

    def __init__(self, config: CpmConfig, relations: int):
        super().__init__()
        self.buckets, self.farthest = config.buckets, config.farthest
        self.relative_attention_bias = nn.Parameter(torch.empty(config.buckets + relations, config.heads))
        self.register_buffer("bucket_of", bucket_table(config.buckets, config.farthest), persistent=False)

    def forward(self, positions: Tensor, places: Tensor, same: Tensor, relation: Tensor) -> Tensor:
        """float32 [B,H,S,T]. positions int64 [B,S] and places int64 [B,T]: where tokens and slots stand in their row;
        same bool [B,S,T]; relation int64 [B,S,T], looked at where not `same`."""
        distance = (places[:, None, :] - positions[:, :, None]).clamp(-self.farthest, self.farthest)
        index = torch.where(same, self.bucket_of[distance + self.farthest], self.buckets + relation)
        return nn.functional.embedding(index, self.relative_attention_bias).permute(0, 3, 1, 2).float()


def bucket_table(buckets: int, farthest: int) -> Tensor:
    """int64 [2·farthest + 1]: the bucket of each distance from -farthest to farthest (`_position_bucket` of the source, T5's
    with both directions). A table, since runtimes round logarithms differently and a bucket is all or nothing."""
    with torch.device("cpu"):
        half = buckets // 2
        exact = half // 2
        distances = torch.arange(-farthest, farthest + 1)
        far = distances.abs()
        logarithmic = torch.log(far.clamp(min=1).float() / exact) / math.log(farthest / exact) * (half - exact)
        wide = (exact + logarithmic.to(torch.int32)).clamp(max=half - 1)
        return (distances > 0) * half + torch.where(far < exact, far, wide)


def places_of(attention_mask: Tensor) -> Tensor:
    """int64 [B,T]: where what lies in each slot stands in its row, slots of padding not counted."""
    return attention_mask.cumsum(1) - 1

"""Qwen-7B as first published (modeling_qwen.py of Qwen/Qwen-7B), written as plain operations.

Every parameter has the name that the checkpoint gives it. Nothing is a fused kernel, no control flow depends on data
and no table of positions is kept, so the exported graph says what the mathematics says and is as short for 32768 tokens
as for 1. Shapes, in the field's letters: B batch, S tokens of this step, P tokens before it, H heads, D head_dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.core.errors import UserError
from suture.models.config import required
from suture.models.dimensions import Dimensions
from suture.models.layers import RMSNorm, attend, rotate, split_heads, through, visible

ARCHITECTURES = ("QWenLMHeadModel",)
PREFIX = "transformer."


@dataclass(frozen=True)
class QwenConfig:
    """The part of Qwen's config.json that decides what is computed."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    seq_length: int  # what the model was trained on; NTK and log-n begin beyond it
    rotary_base: float
    norm_epsilon: float
    dynamic_ntk: bool
    logn: bool
    scale_scores: bool
    bias: bool  # of every projection but c_attn, which always has one
    tied: bool

    @classmethod
    def read(cls, config: dict, where: object) -> "QwenConfig":
        """From the keys of config.json; `where` names the file in errors. Raises UserError for a missing key and for
        partial rotary embeddings."""
        if config.get("rotary_pct", 1.0) != 1.0:
            raise UserError(where, f"rotary_pct {config['rotary_pct']} is not supported", "use a model with 1.0")
        for key, least, step in (("kv_channels", 4, 2), ("intermediate_size", 2, 2), ("seq_length", 2, 1)):
            if (value := required(config, key, where)) < least or value % step:
                wrong = f"'{key}' is {value}, but should be at least {least}" + " and even" * (step == 2)
                raise UserError(where, wrong, "use the config.json that came with the weights")
        return cls(
            vocab=required(config, "vocab_size", where),
            hidden=required(config, "hidden_size", where),
            layers=required(config, "num_hidden_layers", where),
            heads=required(config, "num_attention_heads", where),
            head_dim=config["kv_channels"],
            ffn=config["intermediate_size"] // 2,  # the original counts w1 and w2 together
            seq_length=config["seq_length"],
            rotary_base=config.get("rotary_emb_base", 10000),
            norm_epsilon=required(config, "layer_norm_epsilon", where),
            dynamic_ntk=config.get("use_dynamic_ntk", True),
            logn=config.get("use_logn_attn", True),
            scale_scores=config.get("scale_attn_weights", True),
            bias=not config.get("no_bias", True),
            tied=config.get("tie_word_embeddings", False),
        )


class QwenAttention(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.scale = 1 / math.sqrt(config.head_dim) if config.scale_scores else 1.0
        projected = config.heads * config.head_dim
        self.c_attn = nn.Linear(config.hidden, 3 * projected, bias=True)
        self.c_proj = nn.Linear(projected, config.hidden, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(each, self.heads) for each in self.c_attn(x).chunk(3, dim=-1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if logn is not None:
            query = query * logn.to(query.dtype)
        key = torch.cat([past_key, key], dim=2)
        value = torch.cat([past_value, value], dim=2)
        return self.c_proj(attend(query, key, value, self.scale, mask)), key, value


class QwenMLP(nn.Module):
    """SwiGLU, its gate second: c_proj(w1(x) · silu(w2(x)))."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden, config.ffn, bias=config.bias)
        self.w2 = nn.Linear(config.hidden, config.ffn, bias=config.bias)
        self.c_proj = nn.Linear(config.ffn, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w2(x)
        return self.c_proj(self.w1(x) * (gate * torch.sigmoid(gate)))


class QwenBlock(nn.Module):
    def __init__(self, config: QwenConfig):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden, config.norm_epsilon)
        self.attn = QwenAttention(config)
        self.ln_2 = RMSNorm(config.hidden, config.norm_epsilon)
        self.mlp = QwenMLP(config)

    def forward(self, x: Tensor, *attention: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.attn(self.ln_1(x), *attention)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), key, value


class QwenTransformer(nn.Module):
    """Only holds the parameters that the checkpoint names transformer.*"""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.hidden)
        self.h = nn.ModuleList(QwenBlock(config) for _ in range(config.layers))
        self.ln_f = RMSNorm(config.hidden, config.norm_epsilon)


class Qwen(nn.Module):
    """A decoder with its KV cache as arguments and results. Builds on any device, "meta" too."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.transformer = QwenTransformer(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    @property
    def dimensions(self) -> Dimensions:
        config = self.config
        return Dimensions(
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.head_dim,
            hidden=config.hidden,
            vocab=config.vocab,
            ntk_trained_length=config.seq_length if config.dynamic_ntk else None,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        ntk_alpha: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One step: a prompt, a piece of one, or a token.

        input_ids, position_ids: int64 [B,S]. attention_mask: int64 [B,P+S], 0 where a slot is padding.
        past: key and value of layer 0, of layer 1, ..., each [B,H,P,D]. ntk_alpha: float32 [B], where the config has
        dynamic NTK, else None; suture.core.signature.ntk_alpha chooses it.
        Returns logits [B,S,vocab] and the caches as they came, now [B,H,P+S,D]. Rows of padding hold no meaning.
        """
        config = self.config
        cos, sin = rotary_tables(position_ids, config.head_dim, config.rotary_base, ntk_alpha)
        logn = logn_scale(position_ids, config.seq_length) if config.logn else None
        mask = visible(attention_mask, input_ids.shape[1])

        x, presents = through(self.transformer.h, self.transformer.wte(input_ids), past, cos, sin, logn, mask)
        x = self.transformer.ln_f(x)
        logits = nn.functional.linear(x, self.transformer.wte.weight) if config.tied else self.lm_head(x)
        return logits, presents


def rotary_tables(positions: Tensor, head_dim: int, base: float, ntk_alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of position · (base · alpha^(D/(D-2)))^(-2i/D), float32 [B,1,S,D], i counting twice to D/2.

    Dynamic NTK (RotaryEmbedding.update_rotary_pos_emb_cache): alpha stretches the longest wavelength by alpha and
    leaves the shortest as it is.
    """
    if ntk_alpha is None:
        ntk_alpha = torch.ones(1, device=positions.device)
    bases = base * ntk_alpha.float() ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    inverse_frequencies = 1 / bases[:, None] ** exponents
    angles = positions.float()[:, :, None] * inverse_frequencies[:, None, :]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def logn_scale(positions: Tensor, seq_length: int) -> Tensor:
    """log(p + 1) / log(seq_length) beyond seq_length, else 1: float32 [B,1,S,1]. Keeps the entropy of attention steady
    over more keys than training had (https://kexue.fm/archives/8823)."""
    count = positions.float() + 1
    scale = torch.log(count) / math.log(seq_length)
    return torch.where(count > seq_length, scale, torch.ones_like(scale))[:, None, :, None]


def build(config: dict, where: object) -> Qwen:
    return Qwen(QwenConfig.read(config, where))

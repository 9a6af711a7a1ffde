"""The baselines: transformers' own Qwen2, eager and compiled, on a Qwen checkpoint's weights.

Within its trained length the original Qwen computes what Qwen2 does, with as many key-value heads as heads and its three
projections stored as one; so transformers 5, which no longer has the original, can still run its weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from benchmarks.gpu_limits import REPEATS, WARMUP
from suture.models.checkpoint import Checkpoint
from suture.models.families.qwen import QwenConfig

Caches = list[tuple[Tensor, Tensor]]  # key and value of each layer, [B, heads, P, head_dim]


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Qwen2ForCausalLM:
    config = QwenConfig.read(checkpoint.config, checkpoint.folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab,
                hidden_size=config.hidden,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=config.seq_length,
                rms_norm_eps=config.norm_epsilon,
                rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
                tie_word_embeddings=config.tied,
                attn_implementation="sdpa",
            )
        )
    weights = {}
    for theirs, ours in _names(config.layers).items():
        loaded = checkpoint.load(ours).to(device).to(dtype)  # converted where it is faster
        if "c_attn" in ours:
            kind = theirs.rsplit(".", 1)[1]
            for letter, part in zip("qkv", loaded.chunk(3)):
                weights[f"{theirs.rsplit('.', 2)[0]}.{letter}_proj.{kind}"] = part.contiguous()
        else:
            weights[theirs] = loaded
    model.load_state_dict(weights, assign=True, strict=not config.tied)
    with torch.device(device):  # its tables are not weights: nothing loads them
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval().requires_grad_(False)


def _names(layers: int) -> dict[str, str]:
    names = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight"}
    names["lm_head.weight"] = "lm_head.weight"
    for i in range(layers):
        theirs, ours = f"model.layers.{i}", f"transformer.h.{i}"
        names |= {
            f"{theirs}.self_attn.qkv.weight": f"{ours}.attn.c_attn.weight",
            f"{theirs}.self_attn.qkv.bias": f"{ours}.attn.c_attn.bias",
            f"{theirs}.self_attn.o_proj.weight": f"{ours}.attn.c_proj.weight",
            f"{theirs}.input_layernorm.weight": f"{ours}.ln_1.weight",
            f"{theirs}.post_attention_layernorm.weight": f"{ours}.ln_2.weight",
            f"{theirs}.mlp.up_proj.weight": f"{ours}.mlp.w1.weight",
            f"{theirs}.mlp.gate_proj.weight": f"{ours}.mlp.w2.weight",
            f"{theirs}.mlp.down_proj.weight": f"{ours}.mlp.c_proj.weight",
        }
    return names


@torch.no_grad()
def prompt(model: Qwen2ForCausalLM, tokens: Tensor, last: bool = False) -> tuple[Tensor, Caches]:
    """Logits [B,S,vocab] of a prompt [B,S], or of its last token alone, and the caches that it leaves."""
    cache = DynamicCache(config=model.config)
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=int(last))  # 0: all
    return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


class TorchRun:
    """transformers, eager (mode None) with a growing cache, or compiled with a static one. `last`: prompts give the logits
    of their last token alone."""

    def __init__(self, model: Qwen2ForCausalLM, mode: str | None, last: bool = False):
        self.model, self.mode, self.last = model, mode, last
        self.forward = model.forward if mode is None else torch.compile(model.forward, mode=mode, dynamic=False, fullgraph=True)

    def prompt(self, tokens: Tensor) -> Callable[[], Tensor]:
        """A step that runs the whole prompt and returns its logits; compiled, it keeps no cache."""

        @torch.no_grad()
        def step() -> Tensor:
            if self.mode is None:
                return prompt(self.model, tokens, self.last)[0]
            torch.compiler.cudagraph_mark_step_begin()
            return self.forward(input_ids=tokens, use_cache=False, logits_to_keep=int(self.last)).logits

        return step

    def decode(self, tokens: Tensor, caches: Caches) -> Callable[[], Tensor]:
        """A step that decodes tokens [B,1] after `caches`: each call adds a token, as generation does."""
        context = caches[0][0].shape[2]
        if self.mode is None:
            cache = DynamicCache(config=self.model.config)
        else:
            room = WARMUP + REPEATS + 8
            cache = StaticCache(config=self.model.config, max_cache_len=-(-(context + room) // 64) * 64)
        for layer, (key, value) in enumerate(caches):
            cache.update(key, value, layer)

        @torch.no_grad()
        def step() -> Tensor:
            if self.mode is not None:
                torch.compiler.cudagraph_mark_step_begin()
            return self.forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits

        return step

    def close(self) -> None:
        torch._dynamo.reset()

"""Vision-language models as they were published, at tiny sizes and random: files of the published layout and what they compute, written
out from the original code's formulas over the published names."""

import json
from pathlib import Path

import image_text
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
QUERIES, EXTRA = 5, 1  # blocks that the ViT's file has beyond those that are used
CONFIGS = {
    "minigpt4": {
        **image_text.CONFIGS["blip-2"], "model_type": "minigpt4", "architectures": ["MiniGPT4"],
        "text_config": {"model_type": "llama", **image_text.TEXT},
    },
    "ziya_visual": {**image_text.CONFIGS["instructblip"], "model_type": "ziya_visual", "architectures": ["ZiyaVisual"]},
    "viscpm": {
        "model_type": "viscpm", "architectures": ["VLU_CPMBee"], "vocab_size": 96, "dim_model": 64, "num_heads": 4, "dim_head": 16,
        "dim_ff": 96, "num_layers": 2, "position_bias_num_buckets": 32, "position_bias_num_segment_buckets": 32,
        "position_bias_max_distance": 128, "eps": 1e-6, "query_num": QUERIES, "vision_config": VISION,
    },
}  # fmt: skip


def write_config(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * min(0.3, shape[-1] ** -0.5) + ("norm" in name or "_ln" in name))
        for name, shape in shapes.items()
    }


def eva_vit(width: int = 48, inner: int = 96, blocks: int = 2 + EXTRA, side: int = 28, patch: int = 7) -> dict[str, Tensor]:
    """eva_vit_g.pth, but for its size."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, (side // patch) ** 2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for block in range(blocks):
        shapes |= {f"blocks.{block}.norm{place}.{kind}": (width,) for place in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"blocks.{block}.attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
        shapes |= {f"blocks.{block}.attn.qkv.weight": (3 * width, width), f"blocks.{block}.attn.proj.weight": (width, width)}
        shapes |= {f"blocks.{block}.mlp.fc1.weight": (inner, width), f"blocks.{block}.mlp.fc1.bias": (inner,)}
        shapes |= {f"blocks.{block}.mlp.fc2.weight": (width, inner), f"blocks.{block}.mlp.fc2.bias": (width,)}
    return drawn(shapes, 1)


def eva_features(w: dict[str, Tensor], pixels: Tensor, heads: int = 4, blocks: int = 2) -> Tensor:
    """eva_vit.py's VisionTransformer.forward of a file's weights: [B,3,side,side] to [B,tokens,width], before ln_vision."""
    x = conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=7).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for block in range(blocks):
        own = {name.removeprefix(f"blocks.{block}."): each for name, each in w.items() if name.startswith(f"blocks.{block}.")}
        bias = torch.cat([own["attn.q_bias"], torch.zeros_like(own["attn.v_bias"]), own["attn.v_bias"]])
        qkv = (
            linear(normed(own, "norm1", x, 1e-6), own["attn.qkv.weight"], bias)
            .unflatten(2, (3, heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        scores = (qkv[0] * qkv.shape[-1] ** -0.5) @ qkv[1].transpose(2, 3)
        x = x + projected(own, "attn.proj", (scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2))
        x = x + projected(own, "mlp.fc2", gelu(projected(own, "mlp.fc1", normed(own, "norm2", x, 1e-6))))
    return x


def viscpm() -> dict[str, Tensor]:
    """pytorch_model.v1.bin, but for its size: llm.*, vpm.*, query, mapping.*"""
    width, inner, hidden, ffn, config = 48, 96, 64, 96, CONFIGS["viscpm"]
    tower, bee = "vpm.beit3.", "llm."
    shapes = {
        f"{tower}text_embed.weight": (110, width),
        "query": (QUERIES, width),
        f"{tower}vision_embed.mask_token": (1, 1, width),
    }
    shapes |= {f"{tower}vision_embed.cls_token": (1, 1, width), f"{tower}vision_embed.proj.weight": (width, 3, 7, 7)}
    shapes |= {f"{tower}vision_embed.proj.bias": (width,), "vpm.mim_head.weight": (8, width), "vpm.mim_head.bias": (8,)}
    shapes |= {
        f"{tower}encoder.embed_positions.A.weight": (19, width),
        f"{tower}encoder.embed_positions.B.weight": (1024, width),
    }
    for way in "AB":
        norms, products = [f"{tower}encoder.layer_norm.{way}"], {}
        for layer in range(2):
            path = f"{tower}encoder.layers.{layer}."
            norms += [f"{path}{name}.{way}" for name in ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln")]
            products |= {f"{path}self_attn.{name}_proj.{way}": (width, width) for name in ("q", "k", "v", "out")}
            products |= {f"{path}ffn.{way}.fc1": (inner, width), f"{path}ffn.{way}.fc2": (width, inner)}
            shapes |= {f"{path}ffn.{way}.ffn_layernorm.{kind}": (inner,) for kind in ("weight", "bias")}
        shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
        shapes |= {f"{name}.weight": shape for name, shape in products.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in products.items()}
    shapes |= {"mapping.0.weight": (hidden, width), "mapping.2.weight": (hidden, hidden)}
    shapes |= {"mapping.0.bias": (hidden,), "mapping.2.bias": (hidden,)}
    shapes |= {f"{bee}input_embedding.weight": (96, hidden), f"{bee}encoder.output_layernorm.weight": (hidden,)}
    buckets = config["position_bias_num_buckets"] + config["position_bias_num_segment_buckets"]
    shapes |= {f"{bee}position_bias.relative_attention_bias": (buckets, 4)}
    for layer in range(2):
        path = f"{bee}encoder.layers.{layer}."
        shapes |= {
            f"{path}self_att.layernorm_before_attention.weight": (hidden,),
            f"{path}ffn.layernorm_before_ffn.weight": (hidden,),
        }
        names = ("project_q", "project_k", "project_v", "attention_out")
        shapes |= {f"{path}self_att.self_attention.{name}.weight": (hidden, hidden) for name in names}
        shapes |= {f"{path}ffn.ffn.w_in.{name}.weight": (ffn, hidden) for name in ("w_0", "w_1")}
        shapes |= {f"{path}ffn.ffn.w_out.weight": (hidden, ffn)}
    return drawn(shapes, 2)


def viscpm_features(w: dict[str, Tensor], pixels: Tensor, heads: int = 4) -> Tensor:
    """VLU_CPMBee.get_vllm_embedding's vision_hidden_states of a file's weights, as torchscale computes them: both kinds of tokens in
    one tensor, which each multiway module cuts in two."""
    w = {name.removeprefix("vpm.beit3."): each for name, each in w.items()}
    x = conv2d(pixels, w["vision_embed.proj.weight"], w["vision_embed.proj.bias"], stride=7).flatten(2).transpose(1, 2)
    x = torch.cat([w["vision_embed.cls_token"].expand(len(x), -1, -1), x], 1)
    patches = x.shape[1]
    x = torch.cat([x, torch.stack([w["query"]] * len(x))], 1)

    def both(module, x: Tensor) -> Tensor:
        return torch.cat([module("A", x[:, :patches]), module("B", x[:, patches:])], 1)

    x = both(lambda way, x: x + w[f"encoder.embed_positions.{way}.weight"][2 : 2 + x.shape[1]], x)
    for layer in range(2):
        path = f"encoder.layers.{layer}."

        def norm(name: str, x: Tensor, path: str = path) -> Tensor:
            return both(lambda way, x: normed(w, f"{path}{name}.{way}", x, 1e-5), x)

        def product(name: str, x: Tensor, path: str = path) -> Tensor:
            return both(lambda way, x: projected(w, f"{path}self_attn.{name}_proj.{way}", x), x)

        def feed(way: str, x: Tensor, path: str = path) -> Tensor:
            inner = normed(w, f"{path}ffn.{way}.ffn_layernorm", gelu(projected(w, f"{path}ffn.{way}.fc1", x)), 1e-5)
            return projected(w, f"{path}ffn.{way}.fc2", inner)

        given = norm("self_attn_layer_norm", x)
        query, key, value = (product(name, given).unflatten(2, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        seen = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + product("out", norm("self_attn.inner_attn_ln", seen))
        x = x + both(feed, norm("final_layer_norm", x))
    found = normed(w, "encoder.layer_norm.B", x[:, patches:], 1e-5)
    return projected(w, "mapping.2", gelu(projected(w, "mapping.0", found)))


def normed(w: dict[str, Tensor], name: str, x: Tensor, epsilon: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)


def projected(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

"""Graphs of small models of pictures, exported by torch as users export them: random weights, of transformers and diffusers.

python tests/graphs/pictures.py [NAME ...]      into tests/graphs/vision; without names, all of EXPORTS
"""

import importlib
import logging
import operator
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.graphs import weightless

TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TORCHSCRIPT = "torchscript", 17
DYNAMO = "dynamo", 18


class Called(nn.Module):
    """A model by what it is called with and what is read of its result."""

    def __init__(self, model: nn.Module, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Tensor):
        return self.call(self.model, *inputs)


class GroupNorm32(nn.Module):
    """A GroupNorm in float32 between half-precision convolutions, as guided-diffusion and ControlNet's own code have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.Conv2d(32, 4, 1)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, 1, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, norm = self.conv(x), self.norm
        normalised = nn.functional.group_norm(hidden.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
        return self.out(nn.functional.silu(normalised.to(hidden.dtype)))


class Packed(nn.Module):
    """Attention over the patches of all pictures at once, without a batch, with rotary embedding: Qwen2-VL's tower."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        """[S, width] and [S, D/2]"""
        query, key, value = self.qkv(hidden).reshape(len(hidden), 3, self.heads, -1).permute(1, 0, 2, 3).unbind(0)
        doubled = torch.cat([angles, angles], -1)
        cos, sin = doubled.cos().unsqueeze(-2), doubled.sin().unsqueeze(-2)
        query, key = (each * cos + turned(each) * sin for each in (query, key))
        query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(found.squeeze(0).transpose(0, 1).reshape(len(hidden), -1))


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=1, **TOWER))
    return Called(model, lambda model, x: model(x).pooler_output), {"pixel_values": torch.randn(2, 3, 32, 32)}


def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, d_model=64, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        num_queries=10,
    )  # fmt: skip
    read = Called(DetrForObjectDetection(config), lambda model, x: operator.itemgetter("logits", "pred_boxes")(model(x)))
    return read, {"pixel_values": torch.randn(1, 3, 64, 64)}


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.rand(1),
        "img_ids": torch.arange(48.0).reshape(16, 3) % 5, "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return Called(model, lambda model, *given: model(**dict(zip(inputs, given)), return_dict=False)[0]), inputs


def group_norm_float32():
    return GroupNorm32(), {"x": torch.randn(2, 16, 8, 8)}


def packed_rotary():
    return Packed(), {"hidden": torch.randn(12, 64), "angles": torch.rand(12, 8) * 6}


def deformable_attention(of: str):
    """transformers' own function, which is mmcv's."""
    module = importlib.import_module(f"transformers.models.{of}.modeling_{of}").MultiScaleDeformableAttention()
    sides, heads, queries, points = [(6, 8), (3, 4), (2, 2)], 2, 5, 4
    weights = torch.randn(1, queries, heads, len(sides) * points).softmax(-1).reshape(1, queries, heads, len(sides), points)
    inputs = {
        "value": torch.randn(1, sum(height * width for height, width in sides), heads, 8),
        "places": torch.rand(1, queries, heads, len(sides), points, 2) * 1.4 - 0.2, "weights": weights,
    }  # fmt: skip
    return Called(module, lambda module, value, places, weights: module(value, None, sides, None, places, weights, 64)), inputs


EXPORTS = {
    "siglip_head-dynamo-18-float32": (siglip, DYNAMO, torch.float32),
    "siglip_head-torchscript-17-float16": (siglip, TORCHSCRIPT, torch.float16),
    "detr-dynamo-18-float32": (detr, DYNAMO, torch.float32),
    "detr-torchscript-17-float32": (detr, TORCHSCRIPT, torch.float32),
    "deformable_detr_attention-dynamo-18-float32": (partial(deformable_attention, "deformable_detr"), DYNAMO, torch.float32),
    "rt_detr_attention-dynamo-18-float16": (partial(deformable_attention, "rt_detr"), DYNAMO, torch.float16),
    "rt_detr_attention-torchscript-17-float32": (partial(deformable_attention, "rt_detr"), TORCHSCRIPT, torch.float32),
    "flux-dynamo-18-float16": (flux, DYNAMO, torch.float16),
    "group_norm_float32-dynamo-18-float16": (group_norm_float32, DYNAMO, torch.float16),
    "group_norm_float32-torchscript-17-float16": (group_norm_float32, TORCHSCRIPT, torch.float16),
    "packed_rotary-dynamo-18-float32": (packed_rotary, DYNAMO, torch.float32),
    "packed_rotary-torchscript-17-float32": (packed_rotary, TORCHSCRIPT, torch.float32),
}


def export(name: str) -> onnx.ModelProto:
    make, (exporter, opset), dtype = EXPORTS[name]
    torch.manual_seed(0)
    model, inputs = make()
    values = tuple(value.to(dtype) for value in inputs.values())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, more = Path(folder) / "model.onnx", {"external_data": False} if exporter == "dynamo" else {}
        torch.onnx.export(model.eval().to(dtype), values, path, input_names=list(inputs), opset_version=opset,
                          dynamo=exporter == "dynamo", verbose=False, **more)  # fmt: skip
        return onnx.load(path)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or EXPORTS:
        weightless.save(export(name), f"vision/{name}")
        print(name, flush=True)


if __name__ == "__main__":
    main()

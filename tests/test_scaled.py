"""Weights with scales beside them are read as what they mean: of files that compressed-tensors wrote, of gpt-oss's blocks against
transformers' own reading, of DeepSeek's by the formula."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from suture.core.errors import UserError
from suture.core.safetensors_header import read_header
from suture.models.architectures import load_model, open_checkpoint
from suture.models.checkpoint import Checkpoint
from suture.models.scaled import with_meant_weights
from tests.causal_lms import tiny_config, write_checkpoint
from tests.quantised import WRITTEN

FP8 = torch.float8_e4m3fn
BLOCK = [128, 128]


def opened(folder, **config) -> Checkpoint:
    described = {"quant_method": "compressed-tensors"} | config
    tensors = read_header(folder / "model.safetensors")
    return with_meant_weights(Checkpoint(folder, {"quantization_config": described}, tensors, ()))


def test_what_compressed_tensors_wrote(tmp_path):
    with safe_open(WRITTEN, framework="pt") as file:
        groups = json.loads(file.metadata()["config_groups"])
    tensors = load_file(WRITTEN)
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith("expected.")}, tmp_path / "model.safetensors"
    )
    checkpoint = opened(tmp_path, config_groups=groups)
    assert len(groups) == 9
    for module in groups:
        meant, expected = checkpoint.load(f"{module}.weight"), tensors[f"expected.{module}"]
        assert meant.dtype == torch.float32
        assert checkpoint.stored(f"{module}.weight").shape == tuple(expected.shape)
        assert torch.equal(meant.bfloat16(), expected)  # which it rounds
    assert checkpoint.files == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("scales", [(2, 2), (1,), (200, 1), (200,)], ids=["blocks", "tensor", "rows", "rows alone"])
def test_eight_bits_by_the_formula(scales, tmp_path):
    """w · scale, of DeepSeek's blocks of 128 x 128 with the last ones cut, of all, and of rows."""
    torch.manual_seed(0)
    weight, scale = torch.randn(200, 150).to(FP8), torch.rand(scales) + 0.5
    name = "weight_scale_inv" if scales == (2, 2) else "weight_scale"
    save_file({"a.weight": weight, f"a.{name}": scale}, tmp_path / "model.safetensors")
    meant = opened(tmp_path, quant_method="fp8", weight_block_size=BLOCK).load("a.weight")
    for row, column in ((0, 0), (127, 127), (128, 0), (0, 128), (199, 149)):
        at = {(2, 2): (row // 128, column // 128), (1,): (0,), (200, 1): (row, 0), (200,): (row,)}[scales]
        assert meant[row, column] == weight.float()[row, column] * scale[at]


def test_experts_of_eight_bits_are_joined(tmp_path):
    """DeepSeek's and Qwen3's layout: each expert's product has blocks of its own."""
    config = tiny_config("qwen3_moe")
    write_checkpoint(config, tmp_path)
    expected, stored = {}, {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if value.dim() < 2 or "proj" not in name:
            stored[name] = value.bfloat16()
            continue
        stored[name], stored[f"{name}_scale_inv"] = (value * 8).to(FP8), torch.full((1, 1), 0.125)
        expected[name] = stored[name].float() * 0.125
    save_file(stored, tmp_path / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    found = load_model(open_checkpoint(tmp_path), torch.float32).state_dict()
    layer = "model.layers.1."
    assert torch.equal(found[f"{layer}self_attn.q_proj.weight"], expected[f"{layer}self_attn.q_proj.weight"])
    gate, up = (expected[f"{layer}mlp.experts.3.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(found[f"{layer}mlp.experts.gate_up_proj"][3], torch.cat([gate, up]))


def test_gpt_oss_blocks_are_what_transformers_reads(tmp_path):
    torch.manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 24, 2), dtype=torch.uint8)
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path, quant_method="mxfp4")
    assert checkpoint.stored(name).shape == (3, 64, 24)
    assert torch.equal(checkpoint.load(name), convert_moe_packed_tensors(blocks, scales))


def test_nvfp4_as_modelopt_writes_it(tmp_path):
    """w · weight_scale · weight_scale_2, two numbers to a byte, the lower first."""
    packed = torch.tensor([[0x21, 0xF7] * 8], dtype=torch.uint8)  # 0.5, 1, 6, -6
    parts = {"weight": packed, "weight_scale": torch.tensor([[2.0, 4.0]]).to(FP8), "weight_scale_2": torch.tensor(0.5)}
    save_file({f"a.{name}": value for name, value in parts.items()}, tmp_path / "model.safetensors")
    meant = opened(tmp_path, quant_method="modelopt").load("a.weight")
    assert meant.tolist() == [[0.5, 1, 6, -6] * 4 + [1, 2, 12, -12] * 4]


@pytest.mark.parametrize(
    ("parts", "config", "reason"),
    [
        ({"weight_zero_point": torch.zeros(8, 1)}, {}, "a is quantised in a form that is not known: .*weight_zero_point"),
        ({"pre_quant_scale": torch.ones(16)}, {"quant_method": "modelopt"}, "in a form that is not known: pre_quant_scale"),
        ({}, {"transform_config": {"config_groups": {"R1": {}}}}, "its weights are changed by a transform_config"),
        ({"weight_scale": torch.ones(3, 1)}, {}, "has pieces of a.weight that do not fit together"),
        ({"weight_scale": torch.ones(8, 1).int()}, {}, r"weight_scale \(I32\)"),
    ],
)
def test_what_means_something_else_is_refused(parts, config, reason, tmp_path):
    tensors = {"weight": torch.randn(8, 16).to(FP8), "weight_scale": torch.ones(8, 1)} | parts
    save_file({f"a.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        opened(tmp_path, **config).load("a.weight")


def test_another_method_is_refused_by_name(tmp_path):
    config = tiny_config("qwen3_moe") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="describes weights quantised by bitsandbytes"):
        open_checkpoint(tmp_path)

"""Checkpoints as AutoAWQ or GPTQ would have saved them, and the weights that they stand for."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_packed_checkpoint(
    source: Path,
    out: Path,
    method: str,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    version: str = "",
) -> dict[str, torch.Tensor]:
    """Writes the first layer of the checkpoint `source`, packed; returns, by name, the float32 weights [out, in] that it
    stands for. `group_size`: inputs that share a scale; -1: all."""
    random = torch.Generator().manual_seed(0)
    tensors, exact = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if any(part.isdigit() and int(part) > 0 for part in name.split(".")):
            continue
        if weight.ndim < 2 or any(part in name for part in ("wte", "embed", "lm_head")):
            tensors[name] = weight.half()
            continue
        features = weight.shape[1]
        group = torch.arange(features) // (group_size if group_size > 0 else features)
        if act_order:
            group = group[torch.randperm(features, generator=random)]
        q, zeros, scales = _rounded(weight.float().T, group, bits, symmetric)
        prefix = name.removesuffix(".weight")
        exact[name] = ((q - zeros[group]).float() * scales.float()[group]).T
        tensors[f"{prefix}.scales"] = scales
        if method == "awq":
            words = [_words(each.reshape(len(each), -1, 8)[..., AWQ_ORDER], 4) for each in (q, zeros)]
        else:
            stored = zeros if version == "gptq_v2" else (zeros - 1) % (1 << bits)
            count = 32 // bits
            words = [_words(q.T.reshape(q.shape[1], -1, count), bits).T, _words(stored.reshape(len(stored), -1, count), bits)]
            tensors[f"{prefix}.g_idx"] = group.int()
            tensors.setdefault(f"{prefix}.bias", torch.zeros(len(weight)).half())  # as AutoGPTQ does, bias or none
        tensors[f"{prefix}.qweight"], tensors[f"{prefix}.qzeros"] = (each.contiguous() for each in words)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors")
    if (source / "qwen.tiktoken").exists():
        shutil.copy(source / "qwen.tiktoken", out)
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float16", "num_hidden_layers": 1}
    config.pop("layer_types", None)  # of as many layers as there were
    key = "version" if method == "awq" else "checkpoint_format"
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": group_size} | (
        {key: version} if version else {}
    )
    (out / "config.json").write_text(json.dumps(config))
    return exact


def _rounded(weight: torch.Tensor, group: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """q and zeros as integers, scales in float16, of [in, out], one of each for a group."""
    top = (1 << bits) - 1
    rows = [weight[group == index] for index in range(int(group.max()) + 1)]
    low, high = torch.stack([each.amin(0) for each in rows]), torch.stack([each.amax(0) for each in rows])
    if symmetric:
        scales = (torch.maximum(high, -low) / (top // 2)).half()
        zeros = torch.full(scales.shape, (top + 1) // 2)
    else:
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(0, top).int()
    q = (weight / scales.float()[group] + zeros[group]).round().clamp(0, top).int()
    return q, zeros.int(), scales


def _words(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] numbers, the first lowest, as one int32 each."""
    total = sum(parts[..., place].long() << (bits * place) for place in range(parts.shape[-1]))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()

"""Writes compressed_tensors.safetensors, by compressed-tensors itself (0.20.1), in an environment that has it:

    python tests/quantised/make.py

A small Linear of each scheme, compressed, and under "expected." what compressed-tensors decompresses it to; the schemes, as a
config.json has them, in the file's metadata.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils import get_direct_state_dict
from safetensors.torch import save_file

FILE = Path(__file__).with_name("compressed_tensors.safetensors")
SMALL = (8, 64)  # outputs, inputs
SHAPES = dict.fromkeys(("FP8", "FP8_DYNAMIC", "W8A8", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP8A16"), SMALL)
SHAPES |= {"FP8_BLOCK": (136, 160), "W4A16": (8, 128)}  # blocks of 128 x 128, and groups of 128


def linear(scheme, shape: tuple[int, int]) -> torch.nn.Linear:
    module = torch.nn.Linear(*shape[::-1], bias=False).bfloat16()
    module.quantization_scheme = scheme
    initialize_module_for_quantization(module, scheme)
    weight, given = module.weight.data, scheme.weights
    low, high = extremes(weight, given)
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(whole.reshape(module.weight_global_scale.shape))
    scale, _ = calculate_qparams(low, high, given, global_scale=whole)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    return module


def extremes(weight: torch.Tensor, given) -> tuple[torch.Tensor, torch.Tensor]:
    if given.strategy == "tensor":
        return weight.min(), weight.max()
    if given.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if given.strategy == "block":
        height, width = given.block_structure
        blocks = [rows.split(width, 1) for rows in weight.split(height)]
        return tuple(torch.stack([torch.stack([of(part) for part in row]) for row in blocks]) for of in (torch.min, torch.max))
    groups = weight.reshape(len(weight), -1, given.group_size)
    return groups.amin(-1), groups.amax(-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    tensors, groups = {}, {}
    for name, shape in SHAPES.items():
        scheme = preset_name_to_scheme(name, ["Linear"])
        module, key = linear(scheme, shape), name.lower()
        compress_module(module)
        parts = {part: value for part, value in get_direct_state_dict(module).items() if value is not None}
        tensors |= {f"{key}.{part}": value.detach().clone().contiguous() for part, value in parts.items()}
        groups[key] = json.loads(scheme.model_dump_json())
        decompress_module(module)
        tensors[f"expected.{key}"] = module.weight.detach().clone()
    save_file(tensors, FILE, {"config_groups": json.dumps(groups)})

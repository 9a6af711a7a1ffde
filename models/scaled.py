"""Weights of 4 and 8 bits of floating point with scales beside them, as the float32 numbers that they mean.

    fp8 (DeepSeek, Qwen3-FP8)    weight float8 [out, in], weight_scale_inv [out / 128, in / 128]         w · scale
    float-quantized, FP8         weight float8, weight_scale of all, of a row, or of a block             w · scale
    int-quantized                weight int8, weight_scale likewise                                      w · scale
    nvfp4-pack-quantized         weight_packed, weight_scale float8 [out, in / 16], weight_global_scale  w · (scale / global)
    NVFP4                        weight, packed, weight_scale float8 [out, in / 16], weight_scale_2      w · scale · scale_2
    mxfp4-pack-quantized         weight_packed, weight_scale uint8 [out, in / 32]                        w · 2 ** (scale - 127)
    mxfp8-quantized              weight float8, weight_scale uint8 [out, in / 32]                        the same
    pack-quantized               weight_packed int32 [out, in · bits / 32], weight_scale, weight_shape   (w - 2 ** (bits - 1)) · scale
    mxfp4 (gpt-oss)              NAME_blocks [experts, out, in / 32, 16], NAME_scales                    the same, [experts, in, out]

(transformers' finegrained_fp8 and mxfp4, compressed-tensors' compressors, ModelOpt's export.) Two numbers of 4 bits lie in a byte,
the lower first: a sign and, by the other three bits, 0, 0.5, 1, 1.5, 2, 3, 4 or 6. What is rounded while such a model runs, its
activations, is not the weights' business, and their scales are left alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch

from suture.core.errors import UserError
from suture.core.safetensors_header import TensorEntry
from suture.models.checkpoint import Checkpoint, JoinedTensor

METHODS = ("fp8", "compressed-tensors", "modelopt", "mxfp4")
FP8, SCALE = ("F8_E4M3", "F8_E5M2"), ("float32", "float16", "bfloat16", "F8_E8M0")
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCKS, BLOCKS_SCALES = "_blocks", "_scales"
WORD = 32  # bits
BIAS = 127  # of an exponent alone in a byte
DTYPE = "bfloat16"  # in which such models compute
REMEDY = "use a checkpoint in another format, or the model's own, with --quantize"
FORMS = (  # what a weight consists of, with the types that each part may have
    {"weight": FP8, "weight_scale_inv": SCALE},
    {"weight": (*FP8, "I8"), "weight_scale": (*SCALE, "U8")},
    {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": ("float32",)},
    {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": ("float32",)},
    {"weight_packed": ("U8",), "weight_scale": ("U8",)},
    {"weight_packed": ("I32",), "weight_scale": SCALE, "weight_shape": ("I64", "I32")},
)

Parts = dict[str, TensorEntry]


def with_meant_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each such weight as one to be computed when it is read. Raises UserError for a form that is none of
    the above."""
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") not in METHODS:
        return checkpoint
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise UserError(checkpoint.folder, f"its weights are changed by a {key}, which is not supported", REMEDY)
    joined, left = dict(checkpoint.joined), dict(checkpoint.tensors)
    for module, parts in _modules(checkpoint).items():
        form = next((form for form in FORMS if _is(parts, form)), None)
        if form is None or any(len(entry.shape) > 2 for entry in parts.values()):
            found = ", ".join(f"{name} ({entry.dtype})" for name, entry in sorted(parts.items()))
            raise UserError(checkpoint.folder, f"{module} is quantised in a form that is not known: {found}", REMEDY)
        shape = _shape(checkpoint, module, parts)
        load = partial(_meant, checkpoint, module, parts, shape, _block(config))
        for name in parts:
            del left[f"{module}.{name}"]
        left[f"{module}.weight"] = parts.get("weight_packed") or parts["weight"]
        joined[f"{module}.weight"] = JoinedTensor(DTYPE, shape, load, tuple(parts.values()))
    for name, blocks in checkpoint.tensors.items():
        scales = checkpoint.tensors.get(name.removesuffix(BLOCKS) + BLOCKS_SCALES)
        if name.endswith(BLOCKS) and scales is not None and blocks.dtype == scales.dtype == "U8" and len(blocks.shape) == 4:
            experts, features, groups, size = blocks.shape
            whole = name.removesuffix(BLOCKS)
            shape = (experts, 2 * groups * size, features)
            load = partial(_experts, checkpoint, name, scales.name, shape)
            del left[name], left[scales.name]
            left[whole] = blocks
            joined[whole] = JoinedTensor(DTYPE, shape, load, (blocks, scales))
    return replace(checkpoint, tensors=left, joined=joined)


def _modules(checkpoint: Checkpoint) -> dict[str, Parts]:
    """By the name of each module whose weight has scales, all that its weight consists of."""
    modules: dict[str, Parts] = {}
    for name, entry in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part.startswith("weight") or part == "pre_quant_scale":
            modules.setdefault(module, {})[part] = entry
    return {module: parts for module, parts in modules.items() if set(parts) != {"weight"} or parts["weight"].dtype in FP8}


def _is(parts: Parts, form: dict[str, tuple[str, ...]]) -> bool:
    return set(parts) == set(form) and all(parts[name].dtype in kinds for name, kinds in form.items())


def _block(config: Mapping) -> object:
    """[rows, columns] of the blocks that have a scale of their own, where config.json says so."""
    groups = config.get("config_groups")
    of_groups = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    )
    given = [weights.get("block_structure") for weights in of_groups if isinstance(weights, dict)]
    return config.get("weight_block_size") or next((block for block in given if block), None)


def _shape(checkpoint: Checkpoint, module: str, parts: Parts) -> tuple[int, ...]:
    if "weight_shape" in parts:
        return tuple(checkpoint.load(f"{module}.weight_shape").flatten().tolist())
    packed = parts.get("weight_packed") or parts["weight"]
    return (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.dtype == "U8" else packed.shape


def _meant(checkpoint: Checkpoint, module: str, parts: Parts, shape: tuple[int, ...], block: object) -> torch.Tensor:
    """float32 [out, in]."""
    part = {name: checkpoint.load(f"{module}.{name}") for name in parts if name != "weight"}
    packed = part["weight_packed"] if "weight_packed" in part else checkpoint.load(f"{module}.weight")
    if packed.dtype == torch.uint8:
        weight = _numbers(packed)
    else:
        weight = _integers(packed, shape) if packed.dtype == torch.int32 else packed.float()
    scale = part.get("weight_scale_inv", part.get("weight_scale"))
    scale = torch.exp2(scale.float() - BIAS) if scale.dtype == torch.uint8 else scale.float()
    if "weight_global_scale" in part:
        scale = scale / part["weight_global_scale"].float()
    if "weight_scale_2" in part:
        scale = scale * part["weight_scale_2"].float()
    return weight.mul_(_over(scale, shape, block))


def _over(scale: torch.Tensor, shape: tuple[int, ...], block: object) -> torch.Tensor:
    """Scales of rows, columns, blocks or groups of a row, so that they broadcast to a weight of that shape. Blocks are `block`
    [rows, columns], the last ones cut. Raises ValueError where they do not fit."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(scale) == shape[0]:
        scale = scale[:, None]
    if scale.dim() != 2 or len(shape) != 2:
        raise ValueError(f"scales of shape {list(scale.shape)}")
    for axis, (count, size) in enumerate(zip(scale.shape, shape)):
        if count in (1, size):
            continue
        given = [block[axis]] if isinstance(block, list) and len(block) == 2 and isinstance(block[axis], int) else []
        even = [size // count] if axis == 1 and size % count == 0 else []  # groups of a row have all one size
        fitting = (each for each in (*given, *even) if each > 0 and -(-size // each) == count)
        each = next(fitting, None)
        if each is None:
            raise ValueError(f"{count} scales for {size} numbers")
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return scale


def _numbers(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [..., n] as the 4-bit numbers in it, [..., 2n]."""
    table = torch.tensor([*FP4, *(-number for number in FP4)], dtype=dtype)
    return table[torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).int()]


def _integers(words: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int32 words as the signed numbers of 4 or 8 bits that were packed into them, the first lowest, as float32."""
    bits = next((bits for bits in (4, 8) if words.shape == (shape[0], -(-shape[1] * bits // WORD))), None)
    if bits is None:
        raise ValueError(f"words of shape {list(words.shape)} for a weight of {list(shape)}")
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(len(words), -1)[:, : shape[1]].float() - (1 << (bits - 1))


def _experts(checkpoint: Checkpoint, blocks: str, scales: str, shape: tuple[int, ...]) -> torch.Tensor:
    """bfloat16 [experts, in, out], which holds each product exactly; one expert at a time."""
    packed, exponents = checkpoint.load(blocks), checkpoint.load(scales)
    if prod(exponents.shape) * packed.shape[-1] != packed.numel():
        raise ValueError(f"{list(exponents.shape)} scales for blocks of {list(packed.shape)}")
    whole = torch.empty(shape, dtype=torch.bfloat16)
    for expert, (each, exponent) in enumerate(zip(packed, exponents)):
        factors = torch.exp2(exponent.float() - BIAS).bfloat16()[..., None]
        whole[expert] = (_numbers(each, torch.bfloat16) * factors).flatten(1).T
    return whole

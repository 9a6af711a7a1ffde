"""Weights that AutoAWQ and GPTQ checkpoints hold packed into 32-bit words, unpacked: w = (q - zero) · scale, exactly.

    AWQ    qweight [in, out / 8], qzeros [groups, out / 8]: 8 outputs to a word, in the order 0 2 4 6 1 3 5 7
    GPTQ   qweight [in / n, out], qzeros [groups, out / n]: n = 32 / bits inputs, or outputs, to a word, in order;
           zeros one less than they are (but in format gptq_v2); g_idx [in] the group of each input

(AutoAWQ's awq/utils/packing_utils.py; AutoGPTQ's nn_modules/qlinear, GPTQModel's for gptq_v2.) An input's group is its
place divided by the group's size, unless inputs were quantised in the order of their activations ("desc_act").
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from suture.core.errors import UserError

if TYPE_CHECKING:
    from suture.models.checkpoint import Checkpoint

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the outputs 0, 1, 2 ... lie
WORD = 32
WEIGHT, PACKED = ".weight", ".qweight"
PACKINGS = ("awq", "gptq")
REMEDY = "use a checkpoint in another format, or the model's own, with --quantize"


@dataclass(frozen=True)
class PackedWeight:
    """q uint8 [in, out]; zeros uint8 and scales [groups, out]; group int64 [in]."""

    bits: int
    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        """float32 [out, in], as nn.Linear holds a weight."""
        zeros, scales = self.zeros[self.group].short(), self.scales[self.group].float()
        return ((self.q.short() - zeros).float() * scales).T.contiguous()


def is_packed(checkpoint: "Checkpoint", name: str) -> bool:
    """Whether the weight `name` lies packed in the checkpoint, under another name."""
    return name.endswith(WEIGHT) and name not in checkpoint.tensors and _part(name, PACKED) in checkpoint.tensors


def packed_shape(checkpoint: "Checkpoint", name: str) -> tuple[int, int]:
    """[out, in] of a packed weight."""
    method, bits = _method(checkpoint)
    entry = checkpoint.tensors[_part(name, PACKED)]
    if entry.dtype != "I32" or len(entry.shape) != 2:
        raise UserError(entry.file, f"{entry.name} is not a matrix of 32-bit words", "download it again")
    rows, columns = entry.shape
    return (columns * WORD // bits, rows) if method == "awq" else (columns, rows * WORD // bits)


def check_biases(checkpoint: "Checkpoint", names: Collection[str]) -> None:
    """AutoGPTQ gives every packed product a bias, zeros where the model has none. Raises UserError for one that is not
    zero and that the model, whose tensors are called `names`, would leave out."""
    for name in names:
        bias = _part(name, ".bias")
        if is_packed(checkpoint, name) and bias in checkpoint.tensors and bias not in names and checkpoint.load(bias).any():
            raise UserError(checkpoint.folder, f"{bias} is not zero, but the model has no such bias", REMEDY)


def load_packed(checkpoint: "Checkpoint", name: str) -> PackedWeight:
    """Raises UserError for a packing other than those above, or one that does not fit together."""
    method, bits = _method(checkpoint)
    words, zeros, scales = (checkpoint.load(_part(name, part)) for part in (PACKED, ".qzeros", ".scales"))
    if not (words.dtype == zeros.dtype == torch.int32 and scales.is_floating_point() and words.dim() == zeros.dim() == 2):
        raise UserError(
            checkpoint.folder, f"{_part(name, PACKED)}, its zeros and scales are not a packed weight", "download it again"
        )
    if method == "awq":
        q, zeros = (_apart(each, bits)[..., list(AWQ_PLACES)].reshape(len(each), -1) for each in (words, zeros))
    else:
        q = _apart(words, bits).permute(0, 2, 1).reshape(-1, words.shape[1])
        zeros = _apart(zeros, bits).reshape(len(zeros), -1)
        if checkpoint.config["quantization_config"].get("checkpoint_format") != "gptq_v2":
            zeros = (zeros + 1) & ((1 << bits) - 1)
    features, groups = len(q), len(scales)
    if not groups or features % groups or zeros.shape != scales.shape or scales.shape[1] != q.shape[1]:
        raise UserError(checkpoint.folder, f"{_part(name, PACKED)} and its scales do not fit together", "download it again")
    group = torch.arange(features) // (features // groups)
    if _part(name, ".g_idx") in checkpoint.tensors:
        group = checkpoint.load(_part(name, ".g_idx")).long()
        if group.dim() != 1 or len(group) != features or group.min() < 0 or group.max() >= groups:
            raise UserError(checkpoint.folder, f"{_part(name, '.g_idx')} names no groups of its scales", "download it again")
    return PackedWeight(bits, q.to(torch.uint8), zeros.to(torch.uint8), scales, group)


def _method(checkpoint: "Checkpoint") -> tuple[str, int]:
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, dict):
        raise UserError(checkpoint.folder, "has packed weights, but its config.json has no quantization_config", REMEDY)
    method, bits = config.get("quant_method"), config.get("bits")
    version = config.get("version", "gemm").lower() if method == "awq" else config.get("checkpoint_format", "gptq")
    known = {"awq": ((4,), ("gemm",)), "gptq": ((4, 8), ("gptq", "gptq_v2"))}
    if method not in known or bits not in known[method][0] or version not in known[method][1]:
        raise UserError(checkpoint.folder, f"weights of {bits} bits packed by {method} ({version}) are not supported", REMEDY)
    return method, bits


def _part(name: str, part: str) -> str:
    return name.removesuffix(WEIGHT) + part


def _apart(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] as the numbers in each word, lowest first: int32 [..., n, 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)

"""A deep model with all but a few of its layers left out, so that tracing need not see the same layer thirty times."""

import copy
import re

import torch
from torch import nn

KEPT = 4  # first, two of the alike ones between, last: two, so that their graphs can be compared
POSITION = re.compile(r"layer_(idx|id|number)$")  # attributes that only say which layer it is


def without_middle(model: nn.Module, layers: int) -> tuple[nn.Module, str] | None:
    """A copy of `model` (device "meta") with layers 0, 1, 2 and the last, and the name of its list of layers.

    None where there are no more than that, where the layers are not one ModuleList, or where those between the first
    and the last are not all alike.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and any(True for _ in module.parameters())
    ]
    if layers <= KEPT or len(lists) != 1:
        return None
    name, blocks = lists[0]
    middle = [_description(block) for block in blocks[1:-1]]
    if any(description != middle[0] for description in middle):
        return None
    kept = nn.ModuleList(copy.deepcopy(blocks[i]) for i in (*range(KEPT - 1), layers - 1))
    for position, block in enumerate(kept):
        for module in block.modules():
            for attribute in filter(POSITION.search, vars(module)):
                setattr(module, attribute, position)
    parent, _, own = name.rpartition(".")
    shallow = _copy_without(model, blocks)
    setattr(shallow.get_submodule(parent), own, kept)
    return shallow.eval(), name


def _copy_without(model: nn.Module, left_out: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(left_out): nn.ModuleList()})


def _description(block: nn.Module) -> list:
    """All that decides what a layer computes, but for its weights' values and which layer it is."""
    description = []
    for name, module in block.named_modules():
        plain = {
            key: repr(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and not POSITION.search(key) and _is_plain(value)
        }
        tensors = {
            key: (tuple(tensor.shape), tensor.dtype)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        description.append((name, type(module), plain, tensors))
    return description


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple | torch.dtype)

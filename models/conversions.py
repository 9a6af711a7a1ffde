"""A checkpoint's tensors under the names that transformers' module has for them, by transformers' own rules for the model.

Most names are the module's, or are one for one (`gpt_neox.embed_in` or a prefix left out): a tensor stays where it lies. Of some
the module holds several in one, as the experts of a layer: `experts.0.gate_proj`, `experts.0.up_proj`, … → `experts.gate_up_proj`
[experts, 2 · intermediate, hidden]. Those are put together when they are read, one layer at a time.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from suture.models.checkpoint import Checkpoint, JoinedTensor

Sources = list[tuple[str, str]]  # name in the checkpoint, and which pattern of the converter it is


def named_as(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the names of `model` (on device "meta", as models.causal_lm builds it)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, groups = {}, {}
    joined: dict[str, JoinedTensor] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if pattern is None or name in shapes:
            known = name if name in shapes else target
            tensors[known] = checkpoint.tensors[name]
            if name in checkpoint.joined:
                joined[known] = checkpoint.joined[name]
        else:
            tensors[name] = checkpoint.tensors[name]
            groups.setdefault(target, (by_pattern[pattern], []))[1].append((name, pattern))
    for target, (rule, sources) in groups.items():
        (dtype, *others) = {(checkpoint.joined.get(name) or checkpoint.tensors[name]).dtype for name, _ in sources}
        pieces = [checkpoint.joined[name] for name, _ in sources if name in checkpoint.joined]
        parts = tuple(part for piece in pieces for part in piece.made_of)
        for each in rule.target_patterns:
            made = target.replace(rule.target_patterns[0], each)
            if made in shapes and not others:
                load = partial(_join, checkpoint, model, target, made, rule, sources)
                joined[made] = JoinedTensor(dtype, shapes[made], load, parts)
    return replace(checkpoint, tensors=tensors, joined=joined)


def _join(
    checkpoint: Checkpoint, model: PreTrainedModel, target: str, wanted: str, rule: WeightConverter, sources: Sources
) -> torch.Tensor:
    conversion = deepcopy(rule)
    for name, pattern in sources:
        conversion.add_tensor(target, name, pattern, partial(checkpoint.load, name))
    found = conversion.convert(target, model=model, config=model.config)[wanted]
    return found[0] if isinstance(found, list) else found

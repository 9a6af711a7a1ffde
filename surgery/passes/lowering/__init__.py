"""Passes that turn the portable graph into the forms that TensorRT's parser gets right, in the order in which they run.

Each is here because the form before it is rejected, slow or silently wrong there; its docstring says which. The lowered
graph is made from the portable one and from nothing else.
"""

from types import ModuleType

from suture.surgery.passes.lowering import (
    attention_heads,
    attention_mask,
    attention_products,
    decomposable_attention,
    joint_rotary,
    neighbouring_weights,
    quantised_cache,
    split_products,
)
from suture.surgery.passes.portable import own_cache, query_scale

LOWERING: tuple[ModuleType, ...] = (
    neighbouring_weights,
    split_products,
    joint_rotary,
    quantised_cache,
    attention_heads,
    own_cache,
    attention_products,
    attention_mask,
    query_scale,
    decomposable_attention,
)

"""Passes that write the portable graph, in the order in which they run.

A pass is a module with a docstring that says, as formulas, what becomes what, and `run(graph) -> int`, which returns
how often it did so. To add one, write its file and give it its place in PORTABLE.
"""

from types import ModuleType

from suture.surgery.passes.portable import (
    attention,
    constants,
    duplicates,
    flat_tokens,
    gelu,
    layer_norm,
    linear,
    own_cache,
    packed_heads,
    query_scale,
    repeated_heads,
    rms_norm,
    rotary_embedding,
    scattered_cache,
    shapes,
    swish,
)

PORTABLE: tuple[ModuleType, ...] = (
    constants,
    shapes,
    constants,
    shapes,
    constants,
    duplicates,
    layer_norm,
    rms_norm,
    swish,
    gelu,
    rotary_embedding,
    shapes,
    attention,
    own_cache,
    repeated_heads,
    scattered_cache,
    linear,
    flat_tokens,
    packed_heads,
    query_scale,
)

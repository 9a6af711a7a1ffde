"""Passes that write the ops of onnxruntime's own domain, com.microsoft, in standard ones, in the order in which they run.

They run before all others (but the one that inlines constants) and write what torch's exporters write, too. An op, or a use
of one, that the standard has no form for stays as it is, with the reason as a near miss.
"""

from types import ModuleType

from suture.surgery.passes.import_contrib import (
    block_gather,
    contrib_gelu,
    embed_layer_norm,
    fused_matmul,
    grouped_query_attention,
    multi_head_attention,
    nbits_matmul,
    packed_attention,
    rotary,
    skip_norm,
    unsigned_weights,
)
from suture.surgery.passes.portable import constants

IMPORT_CONTRIB: tuple[ModuleType, ...] = (
    constants,
    embed_layer_norm,
    skip_norm,
    contrib_gelu,
    fused_matmul,
    nbits_matmul,
    block_gather,
    unsigned_weights,
    rotary,
    grouped_query_attention,
    multi_head_attention,
    packed_attention,
)

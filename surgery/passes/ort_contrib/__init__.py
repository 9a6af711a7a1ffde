"""Passes that turn the portable graph into the form that onnxruntime's CUDA provider is quickest at, in the order in which
they run.

The operators are onnxruntime's own (com.microsoft), each one kernel where the standard's are several. The graph is made
from the portable one and from nothing else, and takes steps of one token for any batch, or of many for one sequence.
"""

from types import ModuleType

from suture.surgery.passes.ort_contrib import bias_apart, group_query_attention, quick_gelu, skip_norm
from suture.surgery.passes.portable import interface

ORT_CONTRIB: tuple[ModuleType, ...] = (group_query_attention, skip_norm, quick_gelu, bias_apart, interface)

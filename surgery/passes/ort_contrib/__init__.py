"""Passes that turn the portable graph into the form that onnxruntime's CUDA provider is quickest at.

The operators are onnxruntime's own (com.microsoft), each one kernel where the standard's are several. The graph is made
from the portable one and from nothing else, and takes steps of one token for any batch, or of many for one sequence.
"""

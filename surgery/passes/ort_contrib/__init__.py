"""Passes that turn the portable graph into the form that onnxruntime's CUDA provider is quickest at.

They are onnxruntime's contrib operators (com.microsoft), each one kernel where the standard's are several. The graph is made
from the portable one and from nothing else, and takes steps of one token for any batch, or of many for one sequence.
"""

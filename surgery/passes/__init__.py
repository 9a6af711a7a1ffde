"""Passes: modules with a docstring that states the rewrite as a formula, and `run(graph) -> int`, the number of matches.

import_contrib   contrib operators of onnxruntime in the source to standard operators
portable         fusions that write the portable graph
lowering         forms that TensorRT's parser reads right and fast, from the portable graph
ort_contrib      the portable graph in onnxruntime's contrib operators, for its CUDA provider
"""

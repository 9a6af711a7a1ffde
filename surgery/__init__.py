"""Stage 2: an ONNX graph to the portable one (fused standard ops, static KV cache) and the lowered one (TensorRT's forms)."""

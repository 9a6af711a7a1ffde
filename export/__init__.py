"""Stage 1: a checkpoint to ONNX, with the KV cache as inputs and outputs."""

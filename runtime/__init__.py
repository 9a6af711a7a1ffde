"""Decoders that keep their KV cache between steps, whatever computes them: what validate compares and generate runs.

decoders        one step after another; caches that grow, and caches of fixed capacity bound in place
graphs          an ONNX file in onnxruntime, on a CPU or a GPU (bfloat16 graphs as float32 shadow copies on a CPU)
bound           a batch of sequences in such a session, each input and output bound to memory that stays where it is
layerwise       a graph that is larger than memory, a part of its weights mapped at a time
engine          an engine on a GPU: caches bound in place, CUDA graphs; needs nothing of Suture
engine_decoder  the same as a decoder
"""

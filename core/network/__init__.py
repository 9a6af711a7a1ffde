"""What TensorRT's parser understood of an ONNX file, evaluated layer by layer in torch, without a GPU.

parse        ONNX file -> Network, a plain description, made in a child process
evaluate     Network and inputs -> outputs, with TensorRT's semantics
audit        Network and ONNX graph -> what the parser dropped, retyped or will run slowly
compare      onnxruntime against the network: where they first part, by ONNX node
runner       the same evaluation as a Polygraphy runner
"""

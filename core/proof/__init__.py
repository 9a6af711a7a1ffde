"""Whether graphs compute the same, on small valid inputs, in onnxruntime and in TensorRT's network.

steps        made-up inputs, by what a graph's inputs are for, and outputs read back the same way
differences  how far two outputs lie apart, and where in the graphs that begins
prove        source against portable, portable against lowered: twice each, as float32 shadow copies and in their own types
verdict      what was found, as it stands in manifests and reports
"""

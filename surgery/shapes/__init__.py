"""What is known of tensors' shapes without running the graph.

symbolic_dims    sizes as sums of products of named dimensions
shape_values     the values of small integer tensors, followed through shape arithmetic
foreign_shapes   shapes of contrib operators' outputs, which onnx does not infer
"""

"""Passes that turn the portable graph into the forms that TensorRT's parser gets right.

Each is here because the form before it is rejected, slow or silently wrong there; its docstring says which. The lowered
graph is made from the portable one and from nothing else.
"""

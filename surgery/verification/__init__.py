"""The graph before a pass against the graph after it, in onnxruntime.

verify   compares, and bisects a difference to one match
steps    the inputs that both are given
"""

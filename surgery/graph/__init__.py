"""The graph that passes work on, its files and its weights.

graph     onnx-graphsurgeon's graph indexed by op, and what passes ask of it
files     an ONNX file to a graph and back
weights   where the weights that passes make are written
"""

from suture.surgery.graph.graph import (
    SMALL,
    Graph,
    NearMiss,
    NoMatch,
    consumers,
    input_of,
    inputs_of,
    is_external,
    is_half,
    is_weight_file,
    last_axis,
    need,
    only_consumer,
    onnx_type,
    op_of,
    operands,
    other_input,
    output_of,
    producer,
    rank,
    set_inputs,
    static_dim,
    through,
)

__all__ = [
    "SMALL",
    "Graph",
    "NearMiss",
    "NoMatch",
    "consumers",
    "input_of",
    "inputs_of",
    "is_external",
    "is_half",
    "is_weight_file",
    "last_axis",
    "need",
    "only_consumer",
    "onnx_type",
    "op_of",
    "operands",
    "other_input",
    "output_of",
    "producer",
    "rank",
    "set_inputs",
    "static_dim",
    "through",
]

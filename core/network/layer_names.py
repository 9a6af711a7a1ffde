"""The ONNX nodes that TensorRT says a layer or a kernel was made for."""

import re

# Entries are joined by the unit separator; behind the node's name stand the subgraph and the node that it lies in:
# [ONNX Layer: name | subgraph (then_branch) | name of the If]
ENTRY = re.compile(r"\[ONNX Layer: ([^\x1f]*?)( \| [^\x1f]*)?\](?=\x1f|\s*$)")


def onnx_nodes(metadata: str) -> list[str]:
    """Their names, from the metadata of a layer of the network or of the builder's log."""
    return [found[1] for found in ENTRY.finditer(metadata)]

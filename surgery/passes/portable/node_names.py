"""Node names say layer and role: layers.0/attn.c_attn, layers.0/attention, layers.0/attn/transpose.

The layer and the module's path come from the source's own names (torch's module path, or a path such as
/model/layers.0/self_attn/MatMul); where there are none, the name is the op.
"""

import re
from collections import Counter

import onnx_graphsurgeon as gs

from suture.surgery.graph import Graph
from suture.surgery.graph.files import PRODUCER

WHOLE_MODULES = ("Gemm", "MatMul", "RMSNormalization", "LayerNormalization")  # the one node that their module became
ROLES = {"Attention": "attention", "TRT_Attention": "attention"}


def run(graph: Graph) -> int:
    named = graph.gs.producer_name == PRODUCER  # by an earlier run, which knew modules that these names no longer say
    names = [node.name if named and node.name and not _has_role(node) else _name(node) for node in graph.gs.nodes]
    total, seen = Counter(names), Counter()
    for node, name in zip(graph.gs.nodes, names):
        seen[name] += 1
        node.name = name if total[name] == 1 else f"{name}_{seen[name]}"
    return len(names)


def _has_role(node: gs.Node) -> bool:
    return node.op in ROLES or node.op == "TensorScatter"


def _name(node: gs.Node) -> str:
    """Node names hold the module's path before the last slash (see suture.surgery.graph.files)."""
    path = node.name.rsplit("/", 1)[0] if "/" in node.name else ""
    layer, rest = _layer(path.strip("/").replace("/", "."))
    role = node.op.lower()
    if node.op in ROLES:
        parts = [layer, ROLES[node.op]]
    elif node.op == "TensorScatter":
        parts = [layer, "cache." + node.outputs[0].name.rsplit(".", 1)[-1]]
    else:
        parts = [layer, rest, "" if node.op in WHOLE_MODULES and rest else role]
    return "/".join(part for part in parts if part)


def _layer(path: str) -> tuple[str, str]:
    """transformer.h.3.attn.c_attn → layers.3, attn.c_attn;  transformer.ln_f → "", ln_f."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    if match is None:
        return "", path.rsplit(".", 1)[-1]
    return f"layers.{match.group(1)}", path[match.end() :]

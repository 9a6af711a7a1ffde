"""What of a portable graph onnxruntime's CUDA provider runs on the CPU, or computes wrongly."""

from collections import Counter
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from suture.core.cuda_kernels import NAMES, had_kernel, has_kernel, table
from suture.surgery.graph import Graph, onnx_type
from suture.surgery.passes.portable.visible_mask import wrong_heads

OPSET = 24  # of portable graphs
DROPPED = ("Dropout", "Identity")  # which onnxruntime takes out of a graph before it looks for kernels


def notes(graph: Graph) -> Iterator[str]:
    """A line for each operator and type without a kernel, and for each size of heads that Attention is wrong for."""
    version = f"onnxruntime {table()['onnxruntime']}"
    typed = [(node, _float_type(node)) for node in graph.gs.nodes]
    lacking = Counter((node.op, dtype) for node, dtype in typed if _lacks(node, dtype))
    for (op, dtype), count in lacking.items():
        since = had_kernel(op, OPSET, dtype)
        before = f", though it has one before opset {since}" if since else ""
        nodes = f"{count} node{'s' * (count > 1)}"
        yield f"on CUDA {op} runs on the CPU ({nodes}): {version} has no kernel for it in {NAMES[dtype]} at opset {OPSET}{before}"
    wrong = Counter((heads[0], dtype) for node, dtype in typed if (heads := wrong_heads(node)))
    for (head_dim, dtype), count in wrong.items():
        yield (
            f"on CUDA {count} Attention with head_dim {head_dim} in {NAMES[dtype]} may be wrong in {version}: run it with "
            "ORT_DISABLE_FLASH_ATTENTION=1"
        )


def _lacks(node: gs.Node, dtype: int | None) -> bool:
    standard = node.domain in (None, "", "ai.onnx") and node.op not in DROPPED
    return standard and has_kernel(node.op, OPSET, dtype) is False


def _float_type(node: gs.Node) -> int | None:
    return next((dtype for dtype in map(onnx_type, (*node.inputs, *node.outputs)) if dtype in NAMES), None)

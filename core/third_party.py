"""Settings of other libraries, made once for the whole process: environment variables that they read when they are loaded,
and corrections of their faults. All of it is here, and nothing of it happens where a module is merely imported.
"""

import os
from functools import cache
from typing import Any


def let_threads_sleep() -> None:
    """PyTorch and onnxruntime take turns here: threads of one that spin while they wait cost the other half its time. Before
    either is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def leave_attention_to_cudnn() -> None:
    """Of onnxruntime's CUDA kernels for GroupQueryAttention, XQA is for heads that share keys: for others cuDNN's is quicker.
    Before the session is made."""
    os.environ.setdefault("ORT_ENABLE_XQA", "0")


@cache
def prepare_graphsurgeon() -> None:
    """Before the first graph is read: graph-surgeon removes a node from a tensor's producers or consumers by identity, and
    does not warn of dtypes that numpy lacks, which are never touched here.

    Its own removal takes out the first node that is equal, for which it compares attributes and names, node by node: slow in
    large graphs, and wrong where two are alike."""
    from onnx_graphsurgeon.logger import G_LOGGER
    from onnx_graphsurgeon.util.misc import SynchronizedList

    G_LOGGER.severity = G_LOGGER.ERROR
    SynchronizedList._remove_from_elem = _remove_the_node_itself


def _remove_the_node_itself(nodes: Any, tensor: Any) -> None:
    others = getattr(tensor, nodes.field_name)
    list.pop(others, next(index for index, other in enumerate(others) if other is nodes.parent_obj))

"""Inputs and outputs get the names, shapes and order of the signature, whatever the source called them; unused inputs go.

past_k_0, cache.0.k, ...  →  past_key_values.0.key          [batch, kv_heads, past_sequence | capacity, head_dim]
"""

from dataclasses import replace

from suture.core.signature import (
    EMBEDDINGS,
    LOGITS,
    MASK,
    NTK_ALPHA,
    POSITIONS,
    TOKENS,
    WRITE_INDICES,
    Cache,
    past_name,
    present_name,
)
from suture.surgery.graph import Graph

TOTAL = "past_sequence + sequence"


def run(graph: Graph) -> int:
    signature = graph.signature
    tokens = TOKENS if signature.embedding_width is None else EMBEDDINGS
    names = {signature.tokens: tokens, signature.positions: POSITIONS, signature.mask: MASK, signature.logits: LOGITS}
    names |= {signature.ntk_alpha: NTK_ALPHA, signature.write_indices: WRITE_INDICES}
    for cache in (*signature.caches, *signature.encoder_caches):
        names[cache.past] = past_name(cache.layer, cache.role)
        names[cache.present] = present_name(cache.layer, cache.role)
    names.pop(None, None)
    _make_room(graph, set(names.values()))
    renamed = 0
    for tensor in [*graph.gs.inputs, *graph.gs.outputs]:
        renamed += tensor.name != names.get(tensor.name, tensor.name)
        tensor.name = names.get(tensor.name, tensor.name)
    unused = [tensor for tensor in graph.gs.inputs if not tensor.outputs and not graph.is_output(tensor)]
    graph.gs.inputs = [tensor for tensor in graph.gs.inputs if tensor not in unused]
    absent = {tensor.name for tensor in unused}
    graph.signature = replace(
        signature,
        tokens=signature.tokens and tokens,
        logits=signature.logits and LOGITS,
        positions=None if signature.positions is None or POSITIONS in absent else POSITIONS,
        mask=None if signature.mask is None or MASK in absent else MASK,
        write_indices=signature.write_indices and WRITE_INDICES,
        ntk_alpha=None if signature.ntk_alpha is None or NTK_ALPHA in absent else NTK_ALPHA,
        caches=_renamed(signature.caches, names),
        encoder_caches=_renamed(signature.encoder_caches, names),
    )
    _name_axes(graph)
    return renamed + len(unused)


def _renamed(caches: tuple[Cache, ...], names: dict[str, str]) -> tuple[Cache, ...]:
    return tuple(replace(cache, past=names[cache.past], present=names.get(cache.present)) for cache in caches)


def _make_room(graph: Graph, names: set[str]) -> None:
    """Renames inner tensors that happen to have one of the names."""
    ends = {id(tensor) for tensor in [*graph.gs.inputs, *graph.gs.outputs]}
    for tensor in graph.gs.tensors(check_duplicates=False).values():
        if tensor.name in names and id(tensor) not in ends:
            tensor.name = graph.unique(f"{tensor.name}_inner")


def _name_axes(graph: Graph) -> None:
    signature = graph.signature
    past = signature.capacity if signature.static else "past_sequence"
    width, position_rows = signature.embedding_width, signature.position_rows
    rows = {
        signature.tokens: ["batch", "sequence", *[width] * (width is not None)],
        signature.positions: [*[position_rows] * (position_rows is not None), "batch", "sequence"],
        signature.mask: ["batch", TOTAL],
    }
    inputs = {tensor.name: tensor for tensor in graph.gs.inputs}
    outputs = {tensor.name: tensor for tensor in graph.gs.outputs}
    for name, shape in rows.items():
        if name in inputs and len(inputs[name].shape) == len(shape):
            inputs[name].shape = shape
    mask = inputs.get(signature.mask)
    if mask is not None and len(mask.shape) == 4:  # over slots, as somebody else made it
        mask.shape = ["batch", mask.shape[1], "sequence", past if signature.static else TOTAL]
    for cache in signature.caches:
        _, kv_heads, _, head_dim = inputs[cache.past].shape
        inputs[cache.past].shape = ["batch", kv_heads, past, head_dim]
        outputs[cache.present].shape = ["batch", kv_heads, past if signature.static else TOTAL, head_dim]
    for cache in signature.encoder_caches:
        _, kv_heads, slots, head_dim = inputs[cache.past].shape
        slots = slots if isinstance(slots, int) else "encoder_sequence"
        inputs[cache.past].shape = ["batch", kv_heads, slots, head_dim]
    logits = outputs.get(signature.logits)
    if logits is not None and logits.shape is not None and len(logits.shape) == 3:
        logits.shape = ["batch", logits.shape[1] if logits.shape[1] == 1 else "sequence", logits.shape[2]]

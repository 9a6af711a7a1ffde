"""A decoder's inputs and outputs get the names of the signature, whatever the source called them; unused inputs go.

past_k_0, cache.0.k, ...  →  past_key_values.0.key          [batch, kv_heads, past_sequence | capacity, head_dim]

Axes that the source has fixed stay fixed. A graph without caches keeps all that it takes and gives.
"""

from dataclasses import replace

import onnx_graphsurgeon as gs

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
from suture.surgery.graph import Graph, static_dim

TOTAL = "past_sequence + sequence"


def run(graph: Graph) -> int:
    signature = graph.signature
    if not signature.caches and not signature.encoder_caches:
        return 0
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
    inputs = {tensor.name: tensor for tensor in graph.gs.inputs}
    outputs = {tensor.name: tensor for tensor in graph.gs.outputs}
    rows, steps = (_fixed(inputs.get(signature.tokens), axis, name) for axis, name in enumerate(("batch", "sequence")))
    past = signature.capacity if signature.static else "past_sequence"
    total = past if signature.static else TOTAL
    _call(inputs.get(signature.tokens), [rows, steps])
    _call(inputs.get(signature.tokens), [rows, steps, None])  # embeddings
    _call(inputs.get(signature.positions), [rows, steps])
    _call(inputs.get(signature.positions), [None, rows, steps])  # mrope's
    _call(inputs.get(signature.mask), [rows, TOTAL])
    _call(inputs.get(signature.mask), [rows, None, steps, total])  # over slots, as somebody else made it
    for name in (signature.write_indices, signature.sequence_lengths, signature.ntk_alpha):
        _call(inputs.get(name), [rows])
    for cache in signature.caches:
        _call(inputs[cache.past], [rows, None, past, None])
        _call(outputs[cache.present], [rows, None, total, None])
    for cache in signature.encoder_caches:
        _call(inputs[cache.past], [rows, None, "encoder_sequence", None])
    _call(outputs.get(signature.logits), [rows, steps, None])
    for tensor in outputs.values():
        graph.interface.outputs.pop(tensor.name, None)


def _call(tensor: gs.Tensor | None, names: list[str | int | None]) -> None:
    """Gives the axes of a tensor of this rank these names, but those that are fixed or for which there is none."""
    if tensor is not None and tensor.shape is not None and len(tensor.shape) == len(names):
        tensor.shape = [
            _fixed(tensor, axis, old if name is None else name) for axis, (old, name) in enumerate(zip(tensor.shape, names))
        ]


def _fixed(tensor: gs.Tensor | None, axis: int, otherwise: str | int) -> str | int:
    size = None if tensor is None else static_dim(tensor, axis)
    return otherwise if size is None else size

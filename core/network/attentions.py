"""Which attentions of a network run as one fused kernel, and why the others do not."""

from dataclasses import dataclass

from suture.core.network.description import Layer, Network

HEAD_DIMS = range(16, 257)
LEAST_HEADS = 4  # of the query, where a step may have one token
DTYPES = ("HALF", "BF16")


@dataclass(frozen=True)
class Fusion:
    """One attention: an ATTENTION layer, or one that is written out as product, softmax and product."""

    where: str
    fused: bool
    why: str = ""


def hindrance(network: Network, layer: Layer) -> str | None:
    """Why an ATTENTION_INPUT layer has no fused kernel; None if it has."""
    query = network.tensors[layer.source()]
    if query.dtype not in DTYPES:
        return f"attention in {query.dtype}"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]} (16 to 256)"
    if 0 <= query.shape[1] < LEAST_HEADS:
        return f"one token of {query.shape[1]} query heads (4 or more)"
    return None


def fusions(network: Network) -> list[Fusion]:
    found = []
    readers, producers = network.consumers(), network.producers()
    for layer in network.layers:
        if layer.type == "ATTENTION_INPUT":
            why = hindrance(network, layer)
            found.append(Fusion(layer.attributes["attention"]["name"] or layer.name, why is None, why or ""))
        elif layer.type == "SOFTMAX" and _is_attention(layer, readers, producers):
            found.append(Fusion(layer.node or layer.name, False, "written out as MatMul, Softmax and MatMul"))
    return found


STEPS = ("ELEMENTWISE", "SELECT", "SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE", "EINSUM")


def _is_attention(softmax: Layer, readers: dict[str, list[Layer]], producers: dict[str, Layer]) -> bool:
    """Products before and behind it, with nothing but scale, mask and moves between."""

    def before(name: str | None, steps: int) -> bool:
        layer = producers.get(name) if name else None
        if layer is None or not steps:
            return False
        return layer.type == "MATRIX_MULTIPLY" or (
            layer.type in STEPS and any(before(each, steps - 1) for each in layer.inputs)
        )

    def behind(name: str, steps: int) -> bool:
        return steps > 0 and any(
            layer.type == "MATRIX_MULTIPLY" or (layer.type in STEPS and any(behind(each, steps - 1) for each in layer.outputs))
            for layer in readers[name]
        )

    return before(softmax.source(), 8) and behind(softmax.outputs[0], 8)

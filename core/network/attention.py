"""Layers of attention: ATTENTION_INPUT and _OUTPUT, ROTARY_EMBEDDING, KV_CACHE_UPDATE."""

import torch

from suture.core.network.description import Layer
from suture.core.network.dtypes import widen


def attention(
    attributes: dict,
    query_BHSD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    mask: torch.Tensor | None,
    lengths_B: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(query · keyᵀ + mask) · value, in float32, rounded once. No scale: TensorRT adds none.

    Query heads share the key heads in order (GQA, MQA). A bool mask is True where a query may look. A row that may
    look nowhere is unspecified in TensorRT; here it is NaN, so that nothing comes to rely on it.
    """
    for key in ("query_form", "key_value_form"):
        if attributes[key] not in (None, "PADDED_BHND"):
            raise ValueError(f"{key} {attributes[key]}")
    if attributes["normalization_quantize_scale"] is not None:
        raise ValueError("a quantized softmax")
    shared = query_BHSD.shape[1] // key_BHTD.shape[1]
    key, value = (widen(tensor).repeat_interleave(shared, dim=1) for tensor in (key_BHTD, value_BHTD))
    scores = widen(query_BHSD) @ key.mT
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + widen(mask)
    allowed = _allowed(attributes["causal_kind"], scores.shape, lengths_B, scores.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1) if attributes["norm_op"] == "SOFTMAX" else scores.masked_fill(~allowed, 0)
    return (weights @ value).to(query_BHSD.dtype)


def _allowed(causal: str, shape: torch.Size, lengths_B: torch.Tensor | None, device) -> torch.Tensor:
    """Bool [B or 1, 1, S, T]: upper left j ≤ i; lower right j ≤ i + length - S; and j < length always."""
    queries, keys = shape[-2:]
    row, column = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    length = torch.full((1, 1, 1, 1), keys, device=device) if lengths_B is None else lengths_B.reshape(-1, 1, 1, 1)
    allowed = column < length
    if causal == "UPPER_LEFT":
        allowed = allowed & (column <= row)
    elif causal == "LOWER_RIGHT":
        allowed = allowed & (column <= row + length - queries)
    return allowed.expand(-1, 1, queries, keys)


def rotary_embedding(
    layer: Layer,
    x_BHSD: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates the first `rotary_embedding_dim` (0: all) of D: pairs (i, i + dim/2), or (2i, 2i + 1) if interleaved.

    cos and sin: [positions, dim/2] with `positions_BS` to look them up, [B, S, dim/2] without.
    """
    size = layer.attributes["rotary_embedding_dim"] or x_BHSD.shape[-1]
    if positions_BS is not None:
        cos, sin = cos[positions_BS.long()], sin[positions_BS.long()]
    cos, sin = widen(cos).unsqueeze(1), widen(sin).unsqueeze(1)  # the same for all heads
    rotated, rest = widen(x_BHSD[..., :size]), x_BHSD[..., size:]
    if layer.attributes["interleaved"]:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    joined = torch.stack(turned, -1).flatten(-2) if layer.attributes["interleaved"] else torch.cat(turned, -1)
    return torch.cat((joined.to(x_BHSD.dtype), rest), dim=-1)


def kv_cache_update(
    layer: Layer, cache_BHLD: torch.Tensor, update_BHSD: torch.Tensor, write_indices_B: torch.Tensor
) -> torch.Tensor:
    """The cache with row b's update in slots write_indices[b], write_indices[b] + 1 ..."""
    if layer.attributes["cache_mode"] != "LINEAR" or layer.attributes["update_form"] not in (None, "PADDED_BHND"):
        raise ValueError(f"cache mode {layer.attributes['cache_mode']} of {layer.attributes['update_form']}")
    result, step = cache_BHLD.clone(), update_BHSD.shape[2]
    for row, first in enumerate(write_indices_B.tolist()):
        if not 0 <= first <= cache_BHLD.shape[2] - step:
            raise ValueError(f"{step} tokens at slot {first} do not fit in a cache of {cache_BHLD.shape[2]}")
        result[row, :, first : first + step] = update_BHSD[row]
    return result

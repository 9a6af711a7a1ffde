"""The vision tower of Qwen2-VL and Qwen2.5-VL for pictures of one size, over transformers' own modules.

transformers packs pictures of any sizes into one sequence and cuts it where a table on the device says: what is traced would depend on
values. Here every picture of a batch has the size that the graph is made for, so rotary tables, the order of patches and the windows are
constants of it:

    pixels [B,3,H,W] → patches [B,N,2·3·p·p] → blocks, N in the order of windows → merger [B,N/m²,hidden], back in reading order

A picture is two equal frames, as the image processor makes it. Blocks without full attention see windows of w×w patches. Windows at the
right and lower edge are smaller: all are filled up to one size and hidden by a constant mask, so that attention is one operator over a
batch of windows [B·windows, heads, w·w, D]. Where all are whole there is no mask.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

FRAMES = 2  # that a picture is, beside itself


def factor(config: object) -> int:
    """Pixels of the patches that become one token, each way."""
    vision = config.vision_config
    return vision.patch_size * vision.spatial_merge_size


def features(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Normalised pictures [B,3,H,W] to [B, H·W / factor², hidden]."""
    tower = model.model.visual
    config = tower.config
    height, width = (side // config.patch_size for side in pixel_values.shape[2:])
    unit = config.spatial_merge_size
    x = tower.patch_embed(_patches(pixel_values, config).flatten(0, 1)).unflatten(0, (-1, height * width))
    places = _places(height, width, unit)
    windows, back = None, None
    if getattr(config, "window_size", None) is not None:
        windows, order = _windows(height // unit, width // unit, config.window_size // unit // config.patch_size, unit**2)
        places, back = places[order], _constant(np.argsort(order[:: unit**2] // unit**2), x)
        x = x[:, _constant(order, x)]
    cos, sin = _tables(tower.rotary_pos_emb.inv_freq, _constant(places, x))
    whole = getattr(config, "fullatt_block_indexes", range(config.depth))
    for number, block in enumerate(tower.blocks):
        x = x + _attend(block.attn, block.norm1(x), cos, sin, None if number in whole else windows)
        x = x + block.mlp(block.norm2(x))
    x = tower.merger(x.flatten(0, 1)).unflatten(0, (-1, height * width // unit**2))
    return x if back is None else x[:, back]


def _patches(pixels: Tensor, config: object) -> Tensor:
    """[B,3,H,W] to [B,N,3·2·p·p]: m×m patches that become one token follow each other, each channel by channel, frame by frame."""
    size, merged = config.patch_size, config.spatial_merge_size
    batch, channels, height, width = pixels.shape
    x = pixels.reshape(batch, channels, height // size // merged, merged, size, width // size // merged, merged, size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # 8 dimensions, as many as TensorRT has
    x = x.reshape(batch, height * width // size**2, channels, 1, size**2).expand(-1, -1, -1, FRAMES, -1)
    return x.flatten(2)


def _places(height: int, width: int, unit: int) -> np.ndarray:
    """int64 [N,2]: row and column of each patch, in the order of _patches."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    return grid.reshape(height // unit, unit, width // unit, unit, 2).swapaxes(1, 2).reshape(-1, 2)


def _tables(inverse: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [N,D] in float32: half of the angles go by row, half by column."""
    angles = (places[..., None].float() * inverse.float()).flatten(1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Windows:
    """`count` of them, each of as many patches. `places`: for each window's patches which in the order of windows, those of smaller
    ones filled up with their first; `filled`: bool, those that are not so. Both None where all windows are of one size."""

    count: int
    places: np.ndarray | None = None
    filled: np.ndarray | None = None


def _windows(height: int, width: int, side: int, unit: int) -> tuple[Windows, np.ndarray]:
    """Over a grid of merged tokens, `unit` patches each, windows of `side` each way; and the order of windows, int64 [N]."""
    down, right = -(-height // side), -(-width // side)
    grid = np.full((down * side, right * side), -1)
    grid[:height, :width] = np.arange(height * width).reshape(height, width)
    rows = grid.reshape(down, side, right, side).swapaxes(1, 2).reshape(down * right, side * side)
    rows = [row[row >= 0] for row in rows]
    order = (np.concatenate(rows)[:, None] * unit + np.arange(unit)).flatten()
    sizes, longest = [len(row) * unit for row in rows], max(map(len, rows)) * unit
    if min(sizes) == longest:
        return Windows(len(rows)), order
    starts, steps = np.cumsum([0, *sizes[:-1]])[:, None], np.arange(longest)
    filled = steps < np.array(sizes)[:, None]
    return Windows(len(rows), np.where(filled, starts + steps, starts), filled), order


def _attend(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None) -> Tensor:
    """[B,N,C] to [B,N,C], each patch over all, or over those of its window."""
    query, key, value = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B,H,N,D] each
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    if windows is None:
        seen = scaled_dot_product_attention(query, key, value)
    else:
        query, key, value = (_apart(each, windows) for each in (query, key, value))
        mask = None
        if windows.filled is not None:
            mask = _constant(windows.filled, x)[:, None, None].repeat(x.shape[0], 1, 1, 1)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        seen = seen.unflatten(0, (-1, windows.count)).transpose(1, 2).flatten(2, 3)
        if windows.filled is not None:
            seen = seen[:, :, _constant(np.flatnonzero(windows.filled), x)]
    return attention.proj(seen.transpose(1, 2).flatten(2))


def _apart(x: Tensor, windows: Windows) -> Tensor:
    """[B,H,N,D] to [B·windows, H, patches of a window, D]."""
    x = x if windows.places is None else x[:, :, _constant(windows.places.flatten(), x)]
    return x.unflatten(2, (windows.count, -1)).transpose(1, 2).flatten(0, 1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _constant(values: np.ndarray, like: Tensor) -> Tensor:
    """A table on the device of a tensor. By way of a list: what is made of an array the tracer takes for data that it knows nothing of."""
    return torch.tensor(values.tolist(), device=like.device)

"""Layers that make shapes and move elements: SHAPE, SHUFFLE, SQUEEZE, UNSQUEEZE, CONCATENATION, SLICE, GATHER,
SCATTER, FILL, NON_ZERO, ONE_HOT.

Integer inputs that say where (axes, starts, dimensions) are read on the host, as TensorRT's shape tensors are.
"""

import math

import torch

from suture.core.network.description import Layer
from suture.core.network.dtypes import TORCH


def shape(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape, dtype=torch.int64, device=x.device)


def shuffle(layer: Layer, x: torch.Tensor, dimensions: torch.Tensor | None = None) -> torch.Tensor:
    attributes = layer.attributes
    x = x.permute(attributes["first_transpose"][: x.ndim])
    wanted = attributes["reshape_dims"] if dimensions is None else dimensions.tolist()
    if wanted is not None:
        kept = attributes["zero_is_placeholder"]
        x = x.reshape([x.shape[axis] if size == 0 and kept else size for axis, size in enumerate(wanted)])
    return x.permute(attributes["second_transpose"][: x.ndim])


def squeeze(layer: Layer, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    """Without axes: all of length 1."""
    unit = [axis for axis, size in enumerate(x.shape) if size == 1]
    dropped = {axis % x.ndim for axis in (unit if axes is None else axes.tolist())}
    if any(x.shape[axis] != 1 for axis in dropped):
        raise ValueError(f"axes {sorted(dropped)} of {tuple(x.shape)} are not all 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in dropped])


def unsqueeze(layer: Layer, x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def concatenation(layer: Layer, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=layer.attributes["axis"])


def slice_(layer: Layer, x: torch.Tensor, *dynamic: torch.Tensor | None) -> torch.Tensor:
    """Inputs after x, each in place of the attribute of its name: start, size, stride, the fill value, axes."""
    start, size, stride, fill, axes = [*dynamic, *[None] * 5][:5]
    given = {"start": start, "shape": size, "stride": stride, "axes": axes}
    chosen = {key: layer.attributes[key] if tensor is None else tensor.reshape(-1).tolist() for key, tensor in given.items()}
    axes = range(x.ndim) if chosen["axes"] is None else [axis % x.ndim for axis in chosen["axes"]]
    for axis, first, length, step in zip(axes, chosen["start"], chosen["shape"], chosen["stride"]):
        if (first, length, step) != (0, x.shape[axis], 1):
            x = _sampled(x, axis, first, length, step, layer.attributes["mode"], fill)
    return x


def _sampled(x, axis: int, first: int, length: int, step: int, mode: str, fill) -> torch.Tensor:
    """`length` elements of x along `axis`, at first, first + step ...; `mode` says what lies beyond the ends."""
    if length < 0:
        raise ValueError(f"a slice of length {length} along axis {axis}")
    size = x.shape[axis]
    places = first + step * torch.arange(length, device=x.device)
    inside = (places >= 0) & (places < size)
    if mode == "STRICT_BOUNDS" and not inside.all():
        raise ValueError(f"slice {first}:{step}×{length} leaves axis {axis} of length {size}")
    if mode == "WRAP":
        places = places % size
    elif mode == "REFLECT":
        period = max(2 * (size - 1), 1)
        places = (size - 1) - ((places % period) - (size - 1)).abs()
    else:
        places = places.clamp(0, max(size - 1, 0))
    if mode == "FILL" and size == 0:
        taken = x.new_zeros([*x.shape[:axis], length, *x.shape[axis + 1 :]])
    else:
        taken = x.index_select(axis, places)
    if mode == "FILL":
        value = torch.zeros((), dtype=x.dtype, device=x.device) if fill is None else fill.reshape(())
        taken = torch.where(inside.reshape([-1] + [1] * (x.ndim - axis - 1)), taken, value)
    return taken


def gather(layer: Layer, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Negative indices count from the end. NvInfer.h: an index out of bounds gives zero."""
    mode, axis, leading = (layer.attributes[key] for key in ("mode", "axis", "num_elementwise_dims"))
    indices = indices.long()
    if mode == "ND":
        return _gather_nd(data, indices, leading)
    indices, valid = _bounded(indices, data.shape[axis])
    if mode == "ELEMENT":
        return torch.where(valid, data.gather(axis, indices), torch.zeros((), dtype=data.dtype, device=data.device))
    if leading:  # the first dimension of data and indices runs along
        rows = zip(data.expand(max(len(data), len(indices)), *data.shape[1:]), indices, valid)
        return torch.stack([_taken(row, axis - 1, places, inside) for row, places, inside in rows])
    return _taken(data, axis, indices, valid)


def _taken(data: torch.Tensor, axis: int, indices: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    taken = data.index_select(axis, indices.reshape(-1)).reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])
    if valid.all():
        return taken
    zero = torch.zeros((), dtype=data.dtype, device=data.device)
    return torch.where(valid.reshape([*valid.shape, *[1] * (data.ndim - axis - 1)]), taken, zero)


def _gather_nd(data: torch.Tensor, indices: torch.Tensor, leading: int) -> torch.Tensor:
    """output[b..., j...] = data[b..., indices[b..., j..., :]], b over the first `leading` dimensions."""
    batch, depth = data.shape[:leading], indices.shape[-1]
    flat_data = data.reshape(math.prod(batch), *data.shape[leading:])
    flat_indices = indices.reshape(math.prod(batch), -1, depth)
    places, valid = zip(*(_bounded(flat_indices[..., k], data.shape[leading + k]) for k in range(depth)))
    rows = torch.arange(len(flat_data), device=data.device)[:, None].expand(flat_indices.shape[:2])
    taken = flat_data[(rows, *places)]
    inside = torch.stack(valid).all(0).reshape([*flat_indices.shape[:2], *[1] * (taken.ndim - 2)])
    taken = torch.where(inside, taken, torch.zeros((), dtype=data.dtype, device=data.device))
    return taken.reshape([*indices.shape[:-1], *data.shape[leading + depth :]])


def _bounded(indices: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    counted = torch.where(indices < 0, indices + size, indices)
    return counted.clamp(0, max(size - 1, 0)), (counted >= 0) & (counted < size)


def scatter(layer: Layer, data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    indices = indices.long()
    if layer.attributes["mode"] == "ELEMENT":
        axis = layer.attributes["axis"]
        return data.scatter(axis, torch.where(indices < 0, indices + data.shape[axis], indices), updates)
    result = data.clone()
    result[tuple(indices.unbind(-1))] = updates
    return result


def fill(layer: Layer, *dynamic: torch.Tensor | None) -> torch.Tensor:
    """LINSPACE: alpha + Σ_d beta_d · index_d. Inputs in place of the attributes: dimensions, alpha, beta."""
    dimensions, alpha, beta = [*dynamic, None, None, None][:3]
    attributes = layer.attributes
    if attributes["operation"] != "LINSPACE":
        raise ValueError(f"{attributes['operation']} has no value that could be compared")
    size = attributes["shape"] if dimensions is None else dimensions.tolist()
    dtype = TORCH[attributes["to_type"]]
    device = next((tensor.device for tensor in dynamic if tensor is not None), None)
    result = torch.full(tuple(size), attributes["alpha"] if alpha is None else alpha.item(), dtype=dtype, device=device)
    steps = [attributes["beta"]] if beta is None else beta.reshape(-1).tolist()
    for axis, (length, step) in enumerate(zip(size, steps)):
        ramp = torch.arange(length, dtype=dtype, device=device) * step
        result = result + ramp.reshape([-1] + [1] * (len(size) - axis - 1)).to(dtype)
    return result


def non_zero(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x.nonzero().T.to(TORCH[layer.attributes["indices_type"]])


def one_hot(layer: Layer, indices: torch.Tensor, values: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    axis = layer.attributes["axis"] % (indices.ndim + 1)
    classes = torch.arange(depth.item(), device=indices.device)
    on = indices.unsqueeze(axis) == classes.reshape([-1] + [1] * (indices.ndim - axis))
    return torch.where(on, values[1], values[0])

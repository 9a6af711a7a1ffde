"""A network and its outputs in a file, to hold another TensorRT's against: an upgrade guard.

NET.json has the layers (type, ONNX node, attributes, tensors), the tensors' dtypes and shapes, and of each output for each
set of inputs its shape, its largest value and up to 1,024 values, evenly spaced. Constants stand as checksums.
"""

import difflib
import json
import math
import zlib
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from suture.core.errors import UserError
from suture.core.named import write_text
from suture.core.network.check import CheckResult
from suture.core.network.description import Layer, Network, Packed
from suture.core.reader import read_json
from suture.core.tolerances import scale
from suture.core.typed import Strict, check

FORMAT, SAMPLES, SHOWN = 1, 1024, 12
REMEDY = "write one with --save"
Shape = list[int]


class RecordedValue(Strict):
    shape: Shape
    largest: Annotated[float, Field(ge=0)]
    values: Annotated[list[float | Literal["nan", "inf", "-inf"]], Field(max_length=SAMPLES)]


class RecordedLayer(Strict):
    type: str
    node: str | None
    attributes: dict[str, Any]
    outputs: list[list[str | Shape]]


class Record(Strict):
    """What the file says, as far as it is read."""

    tensorrt: str
    inputs: list[str]
    outputs: list[str]
    tensors: dict[str, Annotated[list[str | Shape], Field(min_length=2, max_length=2)]]
    layers: Annotated[list[RecordedLayer], Field(min_length=1)]
    values: dict[str, dict[str, RecordedValue]]


def record(result: CheckResult) -> dict:
    network = result.network
    if network is None:
        raise UserError(result.model, "TensorRT's parser made no network of it", "correct what it refuses first")
    return _finite({
        "format": FORMAT,
        "tensorrt": network.tensorrt,
        "tolerance": result.tolerance,
        "inputs": list(network.inputs),
        "outputs": list(network.outputs),
        "tensors": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in network.tensors.items()},
        "layers": [_layer(layer, network) for layer in network.layers],
        "values": {outcome.feeds: {name: _sampled(value) for name, value in outcome.values["network"].items()}
                   for outcome in result.outcomes},
    })  # fmt: skip


def _finite(value: Any) -> Any:
    """What JSON has no numbers for, in words."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save_record(result: CheckResult, path: Path) -> None:
    write_text(path, json.dumps(record(result), indent=1) + "\n")


def read_record(path: Path) -> dict:
    """Raises UserError for what `save_record` has not written."""
    found = read_json(path, REMEDY)
    if found.get("format") != FORMAT:
        raise UserError(path, "is not a network that check --save wrote", REMEDY)
    check(found, Record, path, REMEDY)
    if unknown := {*found["inputs"], *found["outputs"]} - found["tensors"].keys():
        raise UserError(path, f"says nothing of the tensor {min(unknown)}", REMEDY)
    return found


def differences(old: dict, result: CheckResult) -> list[str]:
    """What differs between a record and this check's network and outputs, one line each."""
    new = record(result)
    lines = []
    for kind in ("inputs", "outputs"):
        for name in dict.fromkeys([*old[kind], *new[kind]]):
            before, after = (_declared(side, name) if name in side[kind] else "none" for side in (old, new))
            if before != after:
                lines.append(f"{kind[:-1]} {name}: {before} before, {after} now")
    lines += _layer_differences(old["layers"], new["layers"])
    for feeds in dict.fromkeys([*old["values"], *new["values"]]):
        before, after = old["values"].get(feeds, {}), new["values"].get(feeds, {})
        for name in dict.fromkeys([*before, *after]):
            if said := _value_difference(before.get(name), after.get(name), result.tolerance):
                lines.append(f"{feeds}: output {name} {said}")
    return lines


def _declared(side: dict, name: str) -> str:
    dtype, shape = side["tensors"][name]
    return f"{dtype} {shape}"


def _layer(layer: Layer, network: Network) -> dict:
    """Names of unnamed layers and of tensors change with the parser: types and shapes stand for them."""
    kept = {key: _plain(value) for key, value in layer.attributes.items() if key not in ("loop", "conditional", "attention")}
    if layer.attributes.get("attention"):
        kept |= {key: value for key, value in layer.attributes["attention"].items() if value is None or value in _NAMES}
    outputs = [[network.tensors[name].dtype, list(network.tensors[name].shape)] for name in layer.outputs]
    return {"type": layer.type, "node": layer.node, "attributes": kept, "outputs": outputs}


_NAMES = (True, False, "SOFTMAX", "NONE", "UPPER_LEFT", "LOWER_RIGHT", "PADDED_BHND")


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)} crc {zlib.crc32(np.ascontiguousarray(value).data.cast('B')):08x}"
    if isinstance(value, Packed):
        return f"{value.dtype} {list(value.shape)} crc {zlib.crc32(value.data):08x}"
    if is_dataclass(value) and not isinstance(value, type):
        return json.loads(json.dumps(asdict(value)))
    return json.loads(json.dumps(value, default=str))


def _layer_differences(old: list[dict], new: list[dict]) -> list[str]:
    keys = [[json.dumps(layer, sort_keys=True) for layer in side] for side in (old, new)]
    lines = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if tag == "replace" and b - a == d - c:
            lines += [_changed(before, after) for before, after in zip(old[a:b], new[c:d])]
        elif tag != "equal":
            lines += [f"layer {_named(layer)} is gone" for layer in old[a:b]]
            lines += [f"layer {_named(layer)} is new" for layer in new[c:d]]
    return lines[:SHOWN] + ([f"{len(lines) - SHOWN} more layers differ"] if len(lines) > SHOWN else [])


def _named(layer: dict) -> str:
    return layer["type"] + (f" of {layer['node']}" if layer["node"] else "")


def _changed(before: dict, after: dict) -> str:
    if (before["type"], before["node"]) != (after["type"], after["node"]):
        return f"layer {_named(before)} is now {_named(after)}"
    parts = [f"outputs {before['outputs']} are now {after['outputs']}"] if before["outputs"] != after["outputs"] else []
    a, b = before["attributes"], after["attributes"]
    parts += [f"{key} {a.get(key)} is now {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    return f"layer {_named(before)}: {', '.join(parts)}"


def _sampled(value: np.ndarray) -> dict:
    flat = np.asarray(value, np.float64).reshape(-1)
    places = np.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat))).astype(int)
    finite = np.abs(flat[np.isfinite(flat)])
    return {"shape": list(value.shape), "largest": float(finite.max(initial=0)), "values": flat[places].tolist()}


def _value_difference(before: dict | None, after: dict | None, tolerance: float) -> str | None:
    if before is None or after is None:
        return "is new" if before is None else "is gone"
    if before["shape"] != after["shape"]:
        return f"has shape {after['shape']}, before {before['shape']}"
    a, b = np.array(before["values"], float), np.array(after["values"], float)
    if a.shape != b.shape:
        return "has another number of samples"
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(a - b))
    error = float(np.nan_to_num(distance, nan=np.inf).max(initial=0)) / scale(before["largest"], after["largest"])
    return f"differs by {error:.1e} of its largest value" if error > tolerance else None

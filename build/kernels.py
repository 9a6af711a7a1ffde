r"""Which kernels an engine runs, read from the builder's log: the only place that shows them without a GPU.

With ProfilingVerbosity.DETAILED and a VERBOSE logger the builder prints, once, "Layers:" and a line for each:

    Name: _gemv_mha_v1_myl0_8, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [-1,4,1,32], Strides: [...],
    StrideOrder: [...], Datatype: Half, Format: (Linear) ... }, ...], Constants: [...], Outputs: [...],
    TacticName: _gemv_mha_v1_0xe04..., StreamId: 0, Metadata: [ONNX Layer: attention_0]\x1f[ONNX Layer: ...]

Names end in _myl{group}_{place}; a group belongs to one profile, and all but the first profile's say " [profile 1]".
"""

import re
from collections import Counter

from suture.core.network.layer_names import onnx_nodes

HEADING = "Layers:\n"
KEYS = (
    "LayerType|Inputs|Constants|Outputs|ParameterType|TacticName|TacticValue|StreamId|EventId|JumpTarget|JumpTargetThen|"
    "JumpTargetElse|Metadata"
)
TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([-\d,]*)\].*?Datatype: ([^,}]+)")
PROFILE = re.compile(r" \[profile (\d+)\]")
GROUP = re.compile(r"_myl(\d+)_\d+$")
# Work on the host and between streams. A type that is not listed counts as a kernel: better one too many.
JUMPS = ("jmp", "cjmp")  # between the branches of an If, and the rounds of a Loop
NO_KERNEL = ("shape_call", "reshape", "signal", "wait", "TrainStation", "ShapeHostToDevice", "DeviceToShapeHost", *JUMPS)
HOST_VARIABLE = "hvar^"


def is_layer_list(message: str) -> bool:
    return message.startswith(HEADING)


def read_kernels(messages: list[str], profiles: list[str]) -> list[dict]:
    """For each profile its name, number of kernels, kernels by type, jumps, and all entries in the order they run: with
    jumps, which are between the branches of If and the rounds of Loop, some of them do not run, or more than once.

    An entry: name, type, kernel (whether it is one), inputs, constants and outputs (name, shape with -1 for dynamic,
    dtype), tactic, stream, onnx_nodes. `messages`: the log's layer lists; `profiles`: names, at least one.
    """
    lines = [line for message in messages for line in message.splitlines() if line.startswith("Name: ")]
    by_profile: list[list[dict]] = [[] for _ in profiles]
    places = _profiles_of_groups(lines)
    for line in lines:
        by_profile[places.get(_group(line), _profile(line))].append(_entry(line))
    return [
        {
            "profile": name,
            "kernels": sum(entry["kernel"] for entry in entries),
            "by_type": dict(Counter(entry["type"] for entry in entries if entry["kernel"]).most_common()),
            "jumps": sum(entry["type"] in JUMPS for entry in entries),
            "entries": entries,
        }
        for name, entries in zip(profiles, by_profile)
    ]


def _profiles_of_groups(lines: list[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for line in lines:
        if group := _group(line):
            places[group] = max(places.get(group, 0), _profile(line))
    return places


def _group(line: str) -> str | None:
    match = GROUP.search(line.split(", LayerType: ")[0])
    return match[1] if match else None


def _profile(line: str) -> int:
    match = PROFILE.search(line)
    return int(match[1]) if match else 0


def _entry(line: str) -> dict:
    name, *rest = re.split(rf", ({KEYS}): ", PROFILE.sub("", line))
    fields = dict(zip(rest[::2], rest[1::2]))
    outputs = _tensors(fields.get("Outputs", ""))
    on_host = bool(outputs) and all(tensor["name"].startswith(HOST_VARIABLE) for tensor in outputs)
    return {
        "name": name.removeprefix("Name: "),
        "type": fields.get("LayerType", ""),
        "kernel": fields.get("LayerType") not in NO_KERNEL and not on_host,
        "inputs": _tensors(fields.get("Inputs", "")),
        "constants": _tensors(fields.get("Constants", "")),
        "outputs": outputs,
        "tactic": fields.get("TacticName", ""),
        "stream": int(fields.get("StreamId", 0)),
        "onnx_nodes": onnx_nodes(fields.get("Metadata", "")),
    }


def _tensors(text: str) -> list[dict]:
    return [
        {"name": name, "shape": [int(dim) for dim in dims.split(",") if dim], "dtype": dtype.strip().lower()}
        for name, dims, dtype in TENSOR.findall(text)
    ]

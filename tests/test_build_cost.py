"""What the kernels of an engine must move, read from the builder's list of them."""

import build_graphs
import numpy as np
import pytest

from suture.build.cost import add_cost, describe_graph, kernels_a_layer, over_floor
from suture.core.signature import find_signature


def kernel(name: str, inputs=(), constants=(), outputs=(), nodes=()) -> dict:
    tensors = [
        [{"name": n, "shape": list(shape), "dtype": "half"} for n, shape in each] for each in (inputs, constants, outputs)
    ]
    return {"name": name, "type": "kgen", "kernel": True, "onnx_nodes": list(nodes),
            **dict(zip(("inputs", "constants", "outputs"), tensors))}  # fmt: skip


def cost(*kernels: dict, bound=frozenset()) -> tuple[dict, list]:
    proto = build_graphs.decoder()
    profile = {"profile": "decode", "entries": list(kernels)}
    return profile, add_cost(profile, describe_graph(proto, find_signature(proto), frozenset(bound)))


CACHE = [-1, 4, 64, 32]


def test_bytes_of_kernels():
    written = kernel("_scatter_myl0_1", [("present.0.key", CACHE), ("k", [-1, 128])], [], [("present.0.key", CACHE)])
    rows = kernel("__myl_CastGathMul_myl0_2", [("input_ids", [-1, 1])], [("embed", [512, 128])], [("x", [-1, 128])])
    halves = kernel("__myl_SiluMul_myl0_3", [("y", [-1, 256])] * 3, [], [("z", [-1, 256])])
    made = kernel("gemm_myl0_2", [("x", [-1, 128])], [("w", [128, 512])], [("y", [-1, 512])], ["layers.1/mlp.w1"])
    profile, findings = cost(rows, made, halves, written)
    assert [entry["bytes"] for entry in profile["entries"]] == [
        {"weights": 256, "cache": 0, "other": 2 + 256},  # one row of the table
        {"weights": 2 * 128 * 512, "cache": 0, "other": 256 + 1024},
        {"weights": 0, "cache": 0, "other": 1024 + 512},  # parts of y, together no more than all of it
        {"weights": 0, "cache": 2 * 4 * 32, "other": 256},  # one slot
    ]
    assert (findings, kernels_a_layer(profile), profile["kernels_outside_layers"]) == ([], "3", 1)
    assert over_floor(profile) == sum(profile["decode_bytes"].values()) / profile["floor_bytes"]


@pytest.mark.parametrize(
    ("name", "tensor", "where", "bound", "remedy"),
    [
        ("past_key_values.0.key", CACHE, "inputs", {"0.down.weight"}, "lower the graph"),
        ("0.down.weight", [128, 256], "inputs", {"0.down.weight"}, "take --weights constant"),
        ("dconst", [128, 256], "constants", {"0.down.weight"}, "take --weights constant"),
        ("dconst", [128, 256], "constants", set(), "run surgery --merge"),
    ],
)
def test_copies_of_weights_and_caches_are_findings(name, tensor, where, bound, remedy):
    moved = kernel("__myl_TranMove_myl0_1", **{where: [(name, tensor)]}, outputs=[("elsewhere", tensor[::-1])])
    profile, (finding,) = cost(moved, bound=bound)
    assert (finding.severity, remedy in finding.remedy) == ("warning", True)
    assert f"of {name}" in finding.what
    assert profile["copied_bytes"] == 2 * 2 * abs(int(np.prod(tensor)))


def test_a_copy_whose_heads_are_joined_with_the_batch_keeps_its_size():
    moved = kernel("__myl_ReshTran_myl0_1", [("present.0.key", CACHE)], [], [("elsewhere", [-1, 32, 64])])
    used = kernel("_gemm_mha_myl0_2", [("elsewhere", [-1, 32, 64])], [], [("y", [-1, -1, 32])])
    profile, (finding,) = cost(moved, used)
    assert profile["entries"][1]["bytes"]["other"] == 2 * (4 * 64 * 32 + 32)
    assert "1 kernels copy caches" in finding.what


def test_unknown_dtype_leaves_the_bytes_unknown():
    entry = kernel("gemm_myl0_1", [("x", [-1, 128])])
    entry["inputs"][0]["dtype"] = "posit16"
    profile, findings = cost(entry)
    assert (profile["decode_bytes"], over_floor(profile), findings) == (None, None, [])


def test_a_growing_cache_leaves_the_bytes_unknown():
    proto = build_graphs.decoder()
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[2].dim_param = "past"
    profile = {"profile": "any", "entries": [kernel("gemm_myl0_1", [("x", [-1, 128])])]}
    assert add_cost(profile, describe_graph(proto, find_signature(proto))) == []
    assert (profile["decode_bytes"], profile["floor_bytes"]) == (None, None)

"""A level of a 2-D hash grid as GridSample: the same numbers from edge to edge, and what is not proven to be one stays."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lowered_graphs import lowered
from onnx import TensorProto, helper, numpy_helper

from suture.surgery.passes.lowering import hash_level

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT, I64 = TensorProto.FLOAT, TensorProto.INT64
SCALE, ENTRIES = 25.0, 64


def level(fault: str = "", table: int = FLOAT) -> onnx.ModelProto:
    """Of places from 0 to 1, hashed with XOR, its weights by Where and ReduceProd."""
    random = np.random.default_rng(0)
    offsets = np.array([[x, y] for y in (0, 1) for x in (0, 1)])
    if fault == "corner":
        offsets[3] = 0, 1
    numbers = {
        "least": np.float32(0), "most": np.float32(1), "scale": np.float32(SCALE), "half": np.float32(0.5), "one": np.float32(1),
        "corners": offsets, "up": offsets.astype(bool), "axis1": np.array([1]), "axis2": np.array([2]), "last": np.array([-1]),
        "x": np.array(0), "y": np.array(1), "prime": np.array(2654435761), "low": np.array(ENTRIES - 1),
        "table": random.standard_normal([ENTRIES, 3]).astype(helper.tensor_dtype_to_np_dtype(table)),
    }  # fmt: skip
    steps = [
        ("Clip", ["p", "least", "most"], "inside", {}) if fault != "unbounded" else ("Identity", ["p"], "inside", {}),
        ("Mul", ["inside", "scale"], "scaled", {}), ("Add", ["scaled", "half"], "place", {}), ("Floor", ["place"], "cell", {}),
        ("Sub", ["place", "cell"], "part", {}), ("Cast", ["cell"], "whole", {"to": I64}), ("Unsqueeze", ["whole", "axis1"], "w1", {}),
        ("Add", ["w1", "corners"], "at", {}), ("Gather", ["at", "x"], "at_x", {"axis": 2}), ("Gather", ["at", "y"], "at_y", {"axis": 2}),
        ("Mul", ["at_y", "prime"], "hashed", {}), ("BitwiseXor", ["at_x", "hashed"], "mixed", {}),
        ("BitwiseAnd", ["mixed", "low"], "entry", {}), ("Unsqueeze", ["part", "axis1"], "p1", {}), ("Sub", ["one", "p1"], "rest", {}),
        ("Where", ["up", "p1", "rest"], "sides", {}), ("ReduceProd", ["sides", "last"], "share", {"keepdims": 1}),
    ]  # fmt: skip
    if fault == "index":  # of two corners of neighbouring cells that are one corner, another entry
        steps[11] = ("BitwiseXor", ["w1_x", "hashed"], "mixed", {})
        steps.insert(11, ("Gather", ["w1", "x"], "w1_x", {"axis": 2}))
    if fault == "weights":
        steps.append(("Mul", ["share", "share"], "squared", {}))
    steps.append(("Gather", ["table", "entry"], "rows", {"axis": 0}))
    if table != FLOAT:
        steps.append(("Cast", ["rows"], "wide", {"to": FLOAT}))
    steps += [
        ("Mul", ["rows" if table == FLOAT else "wide", "squared" if fault == "weights" else "share"], "weighted", {}),
        ("ReduceSum", ["weighted", "axis1"], "y_out", {"keepdims": 0}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, reads, [name], **attributes) for op, reads, name, attributes in steps], "g",
        [helper.make_tensor_value_info("p", FLOAT, ["n", 2])], [helper.make_tensor_value_info("y_out", FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("table", [FLOAT, TensorProto.FLOAT16])
def test_the_numbers_are_the_same_from_edge_to_edge(table, tmp_path):
    model = level(table=table)
    matched, picture, missed = lowered(model, tmp_path, hash_level)
    assert (matched, missed) == (1, [])
    found = Counter(node.op_type for node in picture.graph.node)
    assert (found["GridSample"], found["Gather"], found["BitwiseXor"]) == (1, 0, 0)
    steps = np.linspace(-0.1, 1.1, 241, dtype=np.float32)
    feeds = {"p": np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)}
    expected, got = (
        ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for each in (model, picture)
    )
    np.testing.assert_allclose(got, expected, atol=3e-5)


FAULTS = {"unbounded": "bounded", "corner": "the same", "weights": "bilinear", "index": "that of the cell"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_level_stays(fault, tmp_path):
    matched, _, missed = lowered(level(fault), tmp_path, hash_level)
    assert matched == 0
    assert FAULTS[fault] in missed[0].reason


def test_a_level_that_is_too_large_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(hash_level, "LIMIT", 27 * 27)
    assert lowered(level(), tmp_path, hash_level)[0] == 1  # 25 cells, and a corner beyond
    monkeypatch.setattr(hash_level, "LIMIT", 27 * 27 - 1)
    matched, _, missed = lowered(level(), tmp_path, hash_level)
    assert matched == 0
    assert "more than a picture" in missed[0].reason

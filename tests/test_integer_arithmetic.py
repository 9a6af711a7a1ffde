"""Bitwise operators and unsigned integers as arithmetic: exact for every index, in onnxruntime and in TensorRT's network, and nothing
that is not known to be bounded is touched."""

from collections import Counter

import numpy as np
import onnx
import pytest
from lowered_graphs import lowered, network, ran
from onnx import TensorProto, helper, numpy_helper

from suture.surgery.passes.lowering import bitwise, unsigned_integers

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = np.arange(1 << 19)  # every index of the largest table
I32, I64, U32, FLOAT = TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.FLOAT
BITWISE = {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"}


def made(nodes: list, inputs: dict[str, int], numbers: dict[str, np.ndarray], output: int = I64) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in inputs.items()]
    graph = helper.make_graph(
        [helper.make_node(op, reads, [name], **attributes) for op, reads, name, attributes in nodes],
        "g", values, [helper.make_tensor_value_info(nodes[-1][2], output, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def same(model: onnx.ModelProto, folder, feeds: dict, in_network: bool = True) -> onnx.ModelProto:
    _, arithmetic, missed = lowered(model, folder, unsigned_integers, bitwise)
    assert not missed
    assert not BITWISE & {node.op_type for node in arithmetic.graph.node}
    expected = ran(model, feeds)
    np.testing.assert_array_equal(ran(arithmetic, feeds), expected)
    if in_network:
        np.testing.assert_array_equal(network(folder, feeds), expected)
    return arithmetic


def of_low_bits(op: str, kind: int, bits: int) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [(op, ["a", "b"], "both", {}), (op, ["both", "c"], "three", {}), ("BitwiseAnd", ["three", "mask"], "y", {})]
    return made(nodes, dict.fromkeys("abc", kind), {"mask": np.array((1 << bits) - 1, dtype)}, kind)


@pytest.mark.parametrize("op", ["BitwiseXor", "BitwiseOr", "BitwiseAnd"])
@pytest.mark.parametrize("kind", [I64, I32])
def test_the_lowest_bits_are_exact_whatever_the_operands_are(op, kind, tmp_path):
    """Every index of a table of 2^19 entries, against numbers over all of the type."""
    dtype, random = helper.tensor_dtype_to_np_dtype(kind), np.random.default_rng(0)
    limits = np.iinfo(dtype)
    others = {name: random.integers(limits.min, limits.max, len(ALL), dtype) for name in "bc"}
    others["b"][:4] = limits.min, limits.max, -1, 0
    arithmetic = same(of_low_bits(op, kind, 19), tmp_path, {"a": ALL.astype(dtype), **others}, in_network=kind == I64)
    found = Counter(node.op_type for node in arithmetic.graph.node)
    assert found["ReduceSum"] == 1  # for three operands


def test_each_pair_of_small_indices_is_exact(tmp_path):
    a, b = (each.ravel().astype(np.int64) for each in np.mgrid[0:512, 0:512])
    same(of_low_bits("BitwiseXor", I64, 9), tmp_path, {"a": a, "b": b, "c": np.zeros_like(a)})


def test_a_hash_of_grid_coordinates_is_exact(tmp_path):
    """tiny-cuda-nn's, of all corners that a float32 place from 0 to 1 can have, and in uint32, where its products wrap."""
    numbers = {
        "scale": np.float32(1000),
        "least": np.float32(0),
        "most": np.float32(1),
        "p": np.uint32(2654435761),
        "size": np.uint32(12345),
    }
    nodes = [("Clip", ["x", "least", "most"], "in", {}), ("Mul", ["in", "scale"], "at", {}), ("Floor", ["at"], "cell", {}),
             ("Cast", ["cell"], "i", {"to": U32}), ("Mul", ["i", "p"], "hash", {}), ("BitwiseXor", ["i", "hash"], "mixed", {}),
             ("Mod", ["mixed", "size"], "entry", {}), ("Cast", ["entry"], "y", {"to": I64})]  # fmt: skip
    feeds = {"x": np.linspace(-0.1, 1.1, 5000, dtype=np.float32)}
    model = made(nodes, {"x": FLOAT}, numbers)
    cells = np.floor(feeds["x"].clip(0, 1) * np.float32(1000)).astype(np.uint32)
    np.testing.assert_array_equal(ran(same(model, tmp_path, feeds), feeds), (cells ^ cells * np.uint32(2654435761)) % 12345)


@pytest.mark.parametrize(
    ("op", "other"), [("Add", None), ("Sub", None), ("Mul", 3_000_000_019), ("BitShift", "LEFT"), ("BitShift", "RIGHT")]
)
def test_unsigned_arithmetic_wraps(op, other, tmp_path):
    nodes = [("Cast", ["a"], "x", {"to": U32}), ("Cast", ["b"], "z", {"to": U32})]
    second = "z" if other is None else "c"
    attributes = {"direction": other} if op == "BitShift" else {}
    nodes += [(op, ["x", second], "w", attributes), ("Cast", ["w"], "y", {"to": I64})]
    random = np.random.default_rng(0)
    feeds = {name: random.integers(0, 1 << 32, 5000) for name in "ab"}
    numbers = {} if other is None else {"c": np.uint32(5 if op == "BitShift" else other)}
    if other is not None:
        del nodes[1], feeds["b"]
    same(made(nodes, dict.fromkeys(feeds, I64), numbers), tmp_path, feeds)


def test_not_is_exact(tmp_path):
    same(made([("BitwiseNot", ["a"], "y", {})], {"a": I64}, {}), tmp_path, {"a": np.arange(-70000, 70000)})


OTHERS = {
    "operands that may be negative": ([("BitwiseXor", ["a", "b"], "y", {})], "bounded and not negative"),
    "a mask that is not of the lowest bits": ([("BitwiseXor", ["a", "b"], "x", {}), ("BitwiseAnd", ["x", "six"], "y", {})], "bounded"),
    "a remainder of the dividend's sign": (
        [("BitwiseXor", ["a", "b"], "x", {}), ("Mod", ["x", "eight"], "y", {"fmod": 1})], "bounded"),
    "a sum that may wrap": (
        [("BitwiseAnd", ["a", "large"], "x", {}), ("Add", ["x", "large"], "z", {}), ("BitwiseXor", ["z", "eight"], "y", {})], "bounded"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_proven_stays(case, tmp_path):
    nodes, reason = OTHERS[case]
    numbers = {"six": np.int64(6), "eight": np.int64(8), "large": np.int64((1 << 62) + 5)}
    _, left, missed = lowered(made(nodes, {"a": I64, "b": I64}, numbers), tmp_path, unsigned_integers, bitwise)
    assert "BitwiseXor" in {node.op_type for node in left.graph.node}
    assert any(reason in each.reason for each in missed)


def test_an_unsigned_end_of_the_graph_stays(tmp_path):
    _, left, missed = lowered(made([("Add", ["a", "a"], "y", {})], {"a": U32}, {}, U32), tmp_path, unsigned_integers, bitwise)
    assert [node.op_type for node in left.graph.node] == ["Add"]
    assert "which the graph takes or gives" in missed[0].reason

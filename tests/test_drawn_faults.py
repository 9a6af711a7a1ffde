"""What random graphs and old exporters have found, each as small as it gets: surgery's portable graph computes what the
source does, with as many attentions fused."""

import numpy as np
import onnx
import pytest
from onnx import helper

from suture.core.signature import find_signature
from suture.surgery.operate import operate
from tests.test_foreign_graphs import run

GRAPHS = {
    # a cast to the same type behind what is folded: it has no output any more when the fold comes to it
    "folded": "g () => (float[2, 4] y) <float[2, 4] w = {1, 2, 3, 4, 5, 6, 7, 8}> { a = Mul(w, w) y = Cast<to=1>(a) }",
    # rows of tokens behind a number that comes first
    "number first": """g (int64[2, 5] input_ids) => (float[2, 5, 4] y)
        <float[3, 4] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float half = {0.5}> {
        x = Gather(table, input_ids)
        y = Mul(half, x)
    }""",
    # two masks of which neither has a row for each token
    "two masks": """g (float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[1, S] first, float[B, 1, 1, S] second)
        => (float[B, 2, S, 8] y) {
        t = Transpose<perm = [0, 1, 3, 2]>(k)
        a = MatMul(q, t)
        b = Add(a, first)
        c = Add(b, second)
        w = Softmax<axis = -1>(c)
        y = MatMul(w, v)
    }""",
    # an old GPT-2: a causal table by Where and padding by Add, keys kept transposed, in a stack
    "stacked past": """g (float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[2, B, 2, P, 8] past, bool[S, T] seen,
        float[B, 1, 1, T] pad) => (float[B, 2, S, 8] y, float[2, B, 2, T, 8] present)
        <float low = {-10000}, int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}> {
        pk = Gather(past, zero)
        pt = Transpose<perm = [0, 1, 3, 2]>(pk)
        t = Transpose<perm = [0, 1, 3, 2]>(k)
        keys = Concat<axis = -1>(pt, t)
        back = Transpose<perm = [0, 1, 3, 2]>(keys)
        pv = Gather(past, one)
        values = Concat<axis = -2>(pv, v)
        first = Unsqueeze(back, axis)
        second = Unsqueeze(values, axis)
        present = Concat<axis = 0>(first, second)
        a = MatMul(q, keys)
        b = Where(seen, a, low)
        c = Add(b, pad)
        w = Softmax<axis = -1>(c)
        y = MatMul(w, values)
    }""",
    # of opset 12, where a softmax is over all axes from one on, and nodes stand in no order
    "no order": """g (float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[S] bias) => (float[B, 2, S, 8] y) {
        y = MatMul(w, v)
        w = Softmax<axis = 3>(c)
        c = Add(bias, a)
        a = MatMul(q, t)
        t = Transpose<perm = [0, 1, 3, 2]>(k)
    }""",
}
ATTENTIONS = {"two masks": 1, "stacked past": 1, "no order": 1}
OPSETS = {"no order": 12}
SIZES = {"B": 2, "S": 3, "P": 4, "T": 7}


@pytest.mark.parametrize("name", GRAPHS)
def test_portable_graph_computes_the_same(name):
    header = f'<ir_version: 10, opset_import: ["": {OPSETS.get(name, 18)}]>'
    source = onnx.parser.parse_model(f"{header} {GRAPHS[name]}")
    done = operate(source)
    portable = done.portable
    assert any("only caches apart become static" in note for note in done.report.notes) == (name == "stacked past")
    assert sum(node.op_type == "Attention" for node in portable.graph.node) == ATTENTIONS.get(name, 0)
    expected, found = (run(model, feeds(source)) for model in (source, portable))
    for output, values in expected.items():
        assert np.abs(values - found[output]).max() <= 1e-5 * np.abs(values).max()


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Of a mask of booleans, each row sees the first slots and one more than the row before."""
    rng, made = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = [dim.dim_value or SIZES[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        values = (
            np.tri(*shape, SIZES["P"])
            if dtype.kind == "b"
            else rng.standard_normal(shape)
            if dtype.kind == "f"
            else np.ones(shape)
        )
        made[value.name] = values.astype(dtype)
    return made


def test_an_output_without_a_shape_is_a_cache_where_one_grows_into_it():
    source = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 23]>
        g (int64[B, S] input_ids, float[B, 2, P, 8] past_k_0, float[B, 2, P, 8] past_v_0) => (float[B, S, 16] logits, float k, float v)
        <float[4, 16] table, float[16, 16] w> {
        x = Gather(table, input_ids)
        y, k, v = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, , past_k_0, past_v_0)
        logits = MatMul(y, w)
    }"""
    )
    for value in source.graph.output[1:]:
        value.type.tensor_type.ClearField("shape")
    assert [(cache.past, cache.present) for cache in find_signature(source).caches] == [("past_k_0", "k"), ("past_v_0", "v")]
    assert np.array_equal([len(value.type.tensor_type.shape.dim) for value in source.graph.output], [3, 0, 0])

"""What random graphs have found, each as small as it gets: surgery's portable graph computes what the source does."""

import numpy as np
import onnx
import pytest

from suture.core.signature import find_signature
from suture.surgery.operate import operate
from tests.test_foreign_graphs import compare

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
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
}


@pytest.mark.parametrize("name", GRAPHS)
def test_portable_graph_computes_the_same(name):
    source = onnx.parser.parse_model(f"{HEADER} {GRAPHS[name]}")
    compare(source, operate(source).portable)


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

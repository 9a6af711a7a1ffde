"""The closed world of operators: what a node has beyond what passes account for keeps them from taking it."""

import ast
import inspect
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from suture.core.signature import find_signature
from suture.core.traits import ACCOUNTED, OTHERS, input_index, named_input, traits, unaccounted
from suture.surgery.graph import Graph, files
from suture.surgery.passes.portable import attention, constants, flat_tokens, last_token_logits, rms_norm, swish
from suture.surgery.plan import LOWERING, PORTABLE

ROOT = Path(__file__).parents[1]
FINDERS = ("nodes", "producer", "consumers", "only_consumer", "through", "contrib_nodes")


def graph_of(text: str, weights: dict[str, np.ndarray] | None = None) -> Graph:
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 24, "com.bogus": 1]> g {text}')
    for name, values in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    signature = find_signature(model, ROOT, need_caches=False)
    return Graph(files.infer_shapes(model), signature, ROOT)


def named_operators() -> set[str]:
    """Every operator by whose name a pass looks for a node."""
    names = set()
    runs = [each.run for phase in (*PORTABLE, *LOWERING) for each in phase.passes]
    for path in {inspect.getfile(run) for run in runs}:
        for call in ast.walk(ast.parse(Path(path).read_text())):
            function = call.func if isinstance(call, ast.Call) else None
            if getattr(function, "id", getattr(function, "attr", "")) in FINDERS:
                names |= {each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return names


def test_the_table_names_what_operators_have():
    for op, names in ACCOUNTED.items():
        trait = traits(op)
        assert trait is not None, op
        own = {*trait.inputs, *trait.outputs, *trait.attributes}
        assert own & set(names), op
        assert set(trait.inputs) <= set(names), f"{op}: which of its inputs does no pass account for?"


def test_every_operator_that_a_pass_looks_for_is_in_the_table():
    names = named_operators()
    assert {"Softmax", "Attention", "Gemm", "MatMulNBits"} <= names
    assert names <= {*ACCOUNTED, *(op for _, op in OTHERS)}


@pytest.mark.parametrize(
    ("node", "beyond"),
    [
        (("Gelu", "", [True], {}, [True]), None),
        (("Gelu", "ai.onnx", [True], {"approximate": "tanh"}, [True]), None),
        (("HardSwish", "", [True], {}, [True]), None),  # no pass of ours looks for it, a user's may
        (("HardSwish", "", [True], {"alpha": 2.0}, [True]), "the unknown attribute alpha"),
        (("Whatever", "", [True], {"alpha": 2.0}, [True]), None),
        (("Cast", "", [True], {"to": 1, "saturate": 1}, [True]), None),
        (("Cast", "", [True], {"to": 17, "saturate": 0}, [True]), "its attribute saturate=0"),
        (("Softmax", "", [True], {"axis": -1, "temperature": 2.0}, [True]), "the unknown attribute temperature"),
        (("ReduceMean", "", [True], {"noop_with_empty_axes": 1}, [True]), "its attribute noop_with_empty_axes=1"),
        (("LayerNormalization", "", [True] * 3, {"axis": -1}, [True, False, False]), None),
        (("LayerNormalization", "", [True] * 3, {"axis": -1}, [True, True]), "its output Mean"),
        (("Attention", "", [True] * 3, {"left_window_size": 8}, [True]), "the unknown attribute left_window_size"),
        (("Attention", "", [True] * 3, {}, [True, False, False, True]), "its output qk_matmul_output"),
        (("Constant", "", [], {"value_string": "x"}, [True]), "its attribute value_string=x"),
        (("FastGelu", "com.microsoft", [True, True], {}, [True]), None),
        (("SimplifiedLayerNormalization", "", [True, True], {"axis": 2, "stash_type": 1}, [True]), None),
        (("SimplifiedLayerNormalization", "", [True, True], {"stash_type": 10}, [True]), "its attribute stash_type=10"),
        (("BiasGelu", "com.microsoft", [True, True], {"alpha": 2.0}, [True]), "the unknown attribute alpha"),
    ],
)
def test_what_is_beyond_the_table(node, beyond):
    assert unaccounted(*node) == beyond


def test_a_pass_that_takes_less_says_so():
    attention = ("Attention", "", [True] * 4, {"is_causal": 1}, [True])
    assert unaccounted(*attention) is None
    assert unaccounted(*attention, ("Q", "K", "V")) == "its input attn_mask"
    assert unaccounted(*attention, ("Q", "K", "V", "attn_mask")) == "its attribute is_causal=1"
    assert unaccounted(*attention, ("Q", "K", "V", "attn_mask", "is_causal")) is None


SCORES = "raw = MatMul(q, k)  w = {softmax}(raw)  y = MatMul(w, vv)"
HEADS = "(float[2, 4, 5, 8] q, float[2, 4, 9, 8] kk, float[2, 4, 9, 8] vv) => (float[2, 4, 5, 8] y)"


@pytest.mark.parametrize(
    ("softmax", "matches", "reasons"),
    [
        ("Softmax", 1, []),
        ("Softmax<temperature = 2.0>", 0, ["the unknown attribute temperature is not accounted for"]),
        ("com.bogus.Softmax", 0, []),
    ],
)
def test_attention_of_another_softmax(softmax, matches, reasons):
    graph = graph_of(f"{HEADS} {{ k = Transpose<perm = [0, 1, 3, 2]>(kk)  {SCORES.format(softmax=softmax)} }}")
    assert attention.run(graph) == matches
    assert [miss.reason for miss in graph.near_misses] == reasons


@pytest.mark.parametrize("product", ["Mul", "com.bogus.Mul", "Mul<axis = 1>"])
def test_swish_of_another_product(product):
    graph = graph_of(f"(float[2, 8] x) => (float[2, 8] y) {{ s = Sigmoid(x)  y = {product}(x, s) }}")
    assert swish.run(graph) == (product == "Mul")


@pytest.mark.parametrize("mean", ["ReduceMean", "ReduceMean<noop_with_empty_axes = 1>"])
def test_a_mean_that_may_be_none(mean):
    graph = graph_of(
        f"""(float[2, 8] x) => (float[2, 8] y) <int64[1] last = {{-1}}, float two = {{2.0}}, float eps = {{0.1}}> {{
        s = Pow(x, two)  m = {mean}(s, last)  a = Add(m, eps)  r = Sqrt(a)  y = Div(x, r) }}"""
    )
    assert rms_norm.run(graph) == (mean == "ReduceMean")


@pytest.mark.parametrize(("mode", "matches"), [("", 1), (", off", 1), (", on", 0), (", given", 0)])
def test_dropout_that_may_be_training(mode, matches):
    graph = graph_of(
        f"""(float[2, 8] x, bool given) => (float[2, 8] y) <float ratio = {{0.5}}> {{
        d = Dropout(x, ratio{mode})  y = Neg(d) }}""",
        {"off": np.array(False), "on": np.array(True)},
    )
    assert graph.match(constants._skip, graph.nodes("Dropout")) == matches
    assert len(graph.near_misses) == 1 - matches


@pytest.mark.parametrize(("axis", "shape"), [(0, "b, 4, 4"), (1, "8, b, 4")])
def test_tokens_look_up_rows_of_a_table_and_not_its_columns(axis, shape):
    graph = graph_of(
        f"(int64[b, 4] input_ids) => (float[{shape}] y) {{ e = Gather<axis = {axis}>(table, input_ids)  y = Relu(e) }}",
        {"table": np.zeros((8, 4), np.float32)},
    )
    assert bool(flat_tokens.run(graph)) == (axis == 0)


def test_a_norm_whose_mean_is_read_keeps_its_tokens_apart():
    text = """(float[tokens, 8] x, int64[3] shape) => (float[b, s, 8] y, float[b, s, 1] mean)
        <float[8] w = {1, 1, 1, 1, 1, 1, 1, 1}> {
        r = Reshape(x, shape)  y, mean = LayerNormalization<axis = -1>(r, w) }"""
    graph = graph_of(text)
    assert flat_tokens.run(graph) == 0
    assert [miss.reason for miss in graph.near_misses] == ["its output Mean is not accounted for"]


def test_the_last_token_is_not_looked_up_above_a_product_that_mixes_rows():
    """Rows of Gemm(transA=1), and of W @ x, come from all rows of x."""
    for node in ("y = Gemm<transA = 1>(x, w)", "y = MatMul(w, x)", "y = LayerNormalization<axis = 0>(x, w)"):
        graph = graph_of(f"(float[8, 8] x, float[8, 8] w) => (float[8, 8] y) {{ {node} }}")
        (last,) = graph.gs.nodes
        assert not last_token_logits._row_by_row(last, graph.input("x"))
    graph = graph_of("(float[8, 8] x, float[8, 8] w) => (float[8, 8] y) { y = Gemm<transB = 1>(x, w) }")
    assert last_token_logits._row_by_row(graph.gs.nodes[0], graph.input("x"))


def test_an_operator_of_another_domain_is_run_as_it_is():
    """constants folds what onnxruntime runs, and leaves what it does not know."""
    for node in ("com.bogus.Neg(c)", "Neg<odd = 1>(c)"):
        graph = graph_of(f"() => (float[1] y) <float[1] c = {{1.0}}> {{ a = {node}  y = Neg(a) }}")
        assert constants.run(graph) == 0
    graph = graph_of("() => (float[1] y) <float[1] c = {1.0}> { a = Neg(c)  b = Neg(a)  y = Sqrt(b) }")
    constants.run(graph)
    assert ort.InferenceSession(files.to_model(graph).SerializeToString()).run(None, {})[0] == 1


def test_inputs_go_by_their_operators_names():
    assert input_index("Attention", "nonpad_kv_seqlen") == 6
    assert input_index("TRT_Attention", "kv_lengths") == 5
    node = onnx.helper.make_node("Attention", ["q", "k", "v", "", "", "", "valid"], ["y"])
    assert [named_input(node, name) for name in ("attn_mask", "nonpad_kv_seqlen")] == ["", "valid"]
    with pytest.raises(ValueError, match="no input mask"):
        input_index("Attention", "mask")

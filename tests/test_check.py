"""suture check on graphs of any kind: what it finds, prints and writes; each finding planted once."""

import json
import xml.etree.ElementTree as xml

import build_graphs
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_network import parsed, save

from suture.core.errors import UserError
from suture.core.network.check import AGREES, DIFFERENT, NOT_COMPARED, REFUSED, check
from suture.core.network.graph_audit import audit_graph
from suture.core.network.inputs import make_feeds
from suture.core.network.parse import ParserDied, ParserProcess
from suture.core.network.validity import uses_of_inputs
from suture.core.network.windows import pooling
from suture.core.shapes import ShapeRange, parse_shape, parse_shapes
from suture.core.signature import find_signature
from suture.validate.check_command import main

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURE = """(float[N,3,H,W] x) => (float[N,4,P,Q] y)
    { c = Conv<pads = [1, 1, 1, 1]>(x, w) p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
      y = Resize<mode = "linear">(p, , s) }"""
REFUSING = """(int64[N] a, int64[N] b, float[N,4] x) => (float[N,4] y, int64[N] z)
    { z = BitwiseXor(a, b) r = Relu(x) q = com.microsoft.FastGelu(r) u = Neg(q) v = Det(m) y = Add(u, v) }"""
ENCODER = """(int64[B,S] ids, int64[B,S] mask, int64[B,S] types) => (float[B,S,4] y)
    { e = Gather(words, ids) t = Gather(kinds, types) h = Add(e, t)
      f = Cast<to = 1>(mask) o = Sub(one, f) d = Mul(o, low) a = Unsqueeze(d, axis)
      k = Transpose<perm = [0, 2, 1]>(h) s = MatMul(h, k) m = Add(s, a) p = Softmax(m) y = MatMul(p, h) }"""


def picture():
    model = parsed(PICTURE)
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    scales = np.array([1, 1, 2, 2], np.float32)
    model.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scales, "s")])
    return model


def encoder():
    model, rng = parsed(ENCODER), np.random.default_rng(1)
    constants = {
        "words": rng.standard_normal((11, 4)), "kinds": rng.standard_normal((2, 4)), "one": np.ones(()), "low": np.full((), -1e4)
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items())
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    return model


def refusing():
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 18, "com.microsoft" : 1]> g {REFUSING}')
    model.graph.initializer.append(numpy_helper.from_array(np.eye(2, dtype=np.float32), "m"))
    node = next(node for node in model.graph.node if node.op_type == "Det")
    node.name = "/encoder/block.3/Det"
    return model


# the result


@pytest.mark.parametrize("make", [picture, encoder])
def test_graphs_without_caches_agree(make, tmp_path):
    result = check(save(make(), tmp_path, "model"))
    assert (result.verdict, result.status) == (AGREES, 0)
    assert [output.tensor for output in result.outcomes[0].outputs] == ["y"]


def test_attention_that_is_written_out_is_said(tmp_path):
    (attention,) = check(save(encoder(), tmp_path, "model")).attentions
    assert not attention.fused
    assert "written out" in attention.why


def test_a_difference_names_the_first_node(tmp_path, monkeypatch):
    """Planted: pooling that takes the least of its window."""
    monkeypatch.setitem(
        __import__("suture.core.network.evaluate", fromlist=["LAYERS"]).LAYERS, "POOLING", lambda layer, x: -pooling(layer, -x)
    )
    result = check(save(picture(), tmp_path, "model"))
    assert (result.verdict, result.status) == (DIFFERENT, 1)
    assert result.outcomes[0].divergence.op == "MaxPool"


def test_every_refusal_is_named_with_origin_and_advice(tmp_path):
    result = check(save(refusing(), tmp_path, "model"))
    assert (result.verdict, result.status) == (REFUSED, 2)
    assert {refusal.operator for refusal in result.refusals} == {"BitwiseXor", "FastGelu", "Det"}
    by_operator = {refusal.operator: refusal for refusal in result.refusals}
    assert by_operator["Det"].origin == "encoder/block.3"
    assert by_operator["Det"].advice is None
    assert "surgery" in by_operator["FastGelu"].advice
    assert "exact integer arithmetic" in by_operator["BitwiseXor"].advice
    assert result.all_read


@pytest.mark.seconds
def test_refusals_of_the_whole_graph_carry_advice(tmp_path):
    model = parsed("(float[6] x) => (float[6] y) { c = Cast<to = 1>(w) y = Mul(c, x) }")
    model.graph.initializer.append(helper.make_tensor("w", onnx.TensorProto.INT16, [6], [1] * 6))
    deep = parsed("(float[1,1,1,1,1,1,1,1,2] x) => (float[1,1,1,1,1,1,1,1,2] y) { y = Neg(x) }")
    typed = parsed("(uint16[6] x) => (float[6] y) { y = Cast<to = 1>(x) }")
    for graph, said in ((model, "store it as float32"), (deep, "eight at most"), (typed, "cast to float32")):
        (refusal,) = check(save(graph, tmp_path, "model")).refusals
        assert str(refusal).startswith("graph as a whole")
        assert said in str(refusal)


def test_refusals_of_importing_come_one_after_the_other(tmp_path):
    """The parser stops at each of them; each is cut out and the rest read again."""
    text = "(float[2,3,4] x, int64[1] a, int64[1] b) => (float[M,N,O] y) { p = ReduceSum(x, a) q = Neg(p) y = ReduceSum(q, b) }"
    result = check(save(parsed(text), tmp_path, "model"))
    assert [refusal.node for refusal in result.refusals] == ["node_of_p", "node_of_y"]
    assert {refusal.advice for refusal in result.refusals} == {"make that input an initializer"}


@pytest.mark.seconds
def test_the_node_that_kills_the_parser_is_found(tmp_path):
    model = parsed(
        "(float[2,3,16] x, int64[2,3] p, float[9,4] c) => (float[2,3,16] y) "
        "{ a = Neg(x) b = com.microsoft.RotaryEmbedding<num_heads = 0>(a, p, c, c) y = Neg(b) }"
    )
    result = check(save(model, tmp_path, "model"))
    assert result.refusals[0].operator == "RotaryEmbedding"
    assert "died of SIGFPE" in result.refusals[0].message


@pytest.mark.seconds
def test_the_parser_lives_on_after_a_death(tmp_path):
    deadly = save(parsed("(float x) => (float y) { y = Attention(x, x, x) }"), tmp_path, "deadly")
    good = save(picture(), tmp_path, "good")
    with ParserProcess() as parser:
        for _ in range(2):
            with pytest.raises(ParserDied):
                parser.parse(deadly)
            assert parser.parse(good).outputs == ("y",)


MISREAD = {
    "Trilu": "(float[4,4] x) => (float[4,4] y) { y = Trilu(x) }",
    "GRU": "(float[2,2,3] x, float[1,12,3] w, float[1,12,4] r) => (float[A,B,C,D] y) { y = GRU<hidden_size = 4, layout = 1>(x, w, r) }",
    "GroupNormalization": "(float[2,4,6] x, float[4] w, float[4] b) => (float[2,4,6] y)"
    "{ y = GroupNormalization<num_groups = 1>(x, w, b) }",
    "ConvTranspose": "(float[1,2,4,4] x, float[2,1,2,2] w, float[1] b) => (float[1,1,H,W] y)"
    "{ y = ConvTranspose<strides = [2, 2], output_padding = [1, 1]>(x, w, b) }",
}


@pytest.mark.parametrize("operator", MISREAD)
def test_what_is_misread_is_named_before_it_is_compared(operator, tmp_path):
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 22]> g {MISREAD[operator]}')
    result = check(save(model, tmp_path, "model"))
    assert result.status == 1
    assert [(error.kind, error.where.split()[0]) for error in result.errors] == [("misread", operator)]


def test_bytes_in_int32_data_are_misread(tmp_path):
    model = parsed("(float[6] x) => (float[6] y) { c = Cast<to = 1>(w) y = Mul(c, x) }")
    model.graph.initializer.append(helper.make_tensor("w", onnx.TensorProto.UINT8, [6], [1, 0, 1, 1, 0, 1]))
    result = check(save(model, tmp_path, "model"))
    assert result.status == 1
    assert [error.where for error in result.errors] == ["tensor w"]


def test_double_is_a_warning(tmp_path):
    result = check(save(parsed("(double[N,4] x) => (double[N,4] y) { y = Relu(x) }"), tmp_path, "model"))
    assert {finding.severity for finding in result.findings if "DOUBLE" in finding.what} == {"warning"}
    assert result.outcomes[0].outputs[0].error < 1e-6


def test_random_numbers_are_not_compared(tmp_path):
    result = check(save(parsed("(float[N,4] x) => (float[N,4] y) { y = RandomUniformLike(x) }"), tmp_path, "model"))
    assert (result.verdict, result.status) == (NOT_COMPARED, 0)
    assert "FILL" in result.not_compared


@pytest.mark.seconds
def test_inputs_that_onnxruntime_does_not_run_are_not_compared(tmp_path):
    text = "(float[N,M] x) => (float[N,K] y) { y = MatMul(x, w) }"
    model = parsed(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((9, 2), np.float32), "w"))
    path = save(model, tmp_path, "model")
    assert "onnxruntime does not run it" in check(path).not_compared
    assert check(path, shapes=parse_shapes(["x=3x9"])).verdict == AGREES


def test_an_unused_input_is_a_part_of_the_interface_and_of_a_decoder_an_error(tmp_path):
    """A decoder's may be a mask that its exporter has lost."""
    result = check(save(parsed("(float[N] x, float[N] idle) => (float[N] y) { y = Relu(x) }"), tmp_path, "model"))
    assert (result.verdict, result.status) == (AGREES, 0)
    assert any("input idle: nothing in the graph uses it" in str(finding) for finding in result.findings)
    decoder = build_graphs.decoder()
    decoder.graph.input.append(helper.make_tensor_value_info("kv_lengths", onnx.TensorProto.INT64, ["batch"]))
    assert any(each.severity == "error" for each in audit_graph(decoder, tmp_path, find_signature(decoder)))


def test_weights_beside_the_file(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(picture(), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    assert check(path).verdict == AGREES


def test_an_input_of_text_is_refused_in_one_line(tmp_path):
    model = parsed("(float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.input.append(helper.make_tensor_value_info("words", onnx.TensorProto.STRING, [2]))
    result = check(save(model, tmp_path, "model"))
    assert result.verdict in (REFUSED, NOT_COMPARED)


# inputs


def test_indices_masks_and_types_are_valid():
    values = make_feeds(encoder())[0].values
    assert 0 <= values["ids"].min() <= values["ids"].max() < 11
    assert values["ids"].max() > 2
    assert set(np.unique(values["types"])) <= {0, 1}
    assert values["mask"].all(axis=1).tolist() == [True, False]
    assert values["mask"].any(axis=1).all()
    assert uses_of_inputs(encoder())["ids"].below == 11


def test_a_fixed_batch_is_that_of_all_inputs():
    """Whichever input fixes it: of one that is called nothing known, too."""
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["": 23]> g (int64[B, S] input_ids, float[1, 2, P, 4] past_k_0, float[1, 2, P, 4] past_v_0,
        float[N, 1] other) => (float[B, S, 8] logits, float[1, 2, T, 4] present_k_0, float[1, 2, T, 4] present_v_0)
        <float[4, 8] table> {
        x = Gather(table, input_ids)
        logits, present_k_0, present_v_0 = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, , past_k_0, past_v_0)
    }"""
    )
    found = make_feeds(model)
    assert [feeds.name for feeds in found] == ["prompt", "chunk", "decode"]
    assert {values.shape[0] for feeds in found for values in feeds.values.values()} == {1}


def test_each_shape_of_a_range_is_checked(tmp_path):
    shapes = {"ids": ShapeRange((1, 1), (2, 8), (4, 16))}
    result = check(save(encoder(), tmp_path, "model"), shapes=shapes)
    assert [outcome.feeds for outcome in result.outcomes] == [f"random inputs, {kind} shapes" for kind in ("opt", "min", "max")]
    assert [feeds.values["mask"].shape for feeds in result.feeds] == [(2, 8), (1, 1), (4, 16)]


def test_the_seed_decides():
    first, same, other = (make_feeds(picture(), seed)[0].values["x"] for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_grammar_of_shapes():
    assert parse_shape("x=2x128") == ("x", ShapeRange((2, 128), (2, 128), (2, 128)))
    assert parse_shape("a=b=1x1,1x128,4X512") == ("a=b", ShapeRange((1, 1), (1, 128), (4, 512)))


@pytest.mark.parametrize(
    ("text", "said"),
    [("x", "names no input"), ("=2x3", "names no input"), ("x=2x", "is not a shape"), ("x=", "is not a shape"),
     ("x=-1x2", "is not a shape"), ("x=1,2", "has 2 shapes"), ("x=1x2,3,4x5", "different numbers"),
     ("x=4,2,8", "min is not below")],
)  # fmt: skip
def test_a_wrong_shape_is_one_line(text, said):
    with pytest.raises(UserError, match=said):
        parse_shapes([text])


@pytest.mark.parametrize(
    ("text", "said"), [("z=2x3", "has no input z"), ("x=2x3", r"input x is"), ("x=2x4x8x8", r"input x is")]
)
def test_a_shape_that_does_not_fit_is_one_line(text, said, tmp_path):
    with pytest.raises(UserError, match=said):
        check(save(picture(), tmp_path, "model"), shapes=parse_shapes([text]))


# the command


@pytest.mark.seconds
def test_table_json_and_junit(tmp_path, capsys):
    good, bad = save(picture(), tmp_path, "good"), save(refusing(), tmp_path, "bad")
    assert main([str(good), "--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]) == 0
    shown = capsys.readouterr()
    assert f"check: {good}: agrees" in shown.out
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == AGREES
    suite = xml.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("failures"), suite.get("tests")) == ("0", "2")
    assert main([str(bad), "--json", "--junit", str(tmp_path / "b.xml")]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["exit_status"] == 2
    assert shown.err.count("\n") == 1
    assert xml.parse(tmp_path / "b.xml").getroot().get("failures") == "1"


@pytest.mark.seconds
def test_a_saved_network_is_compared(tmp_path, capsys):
    path, net = save(picture(), tmp_path, "model"), tmp_path / "net.json"
    assert main([str(path), "--save", str(net)]) == 0
    assert main([str(path), "--against", str(net)]) == 0
    assert "the same network and outputs" in capsys.readouterr().out
    saved = json.loads(net.read_text())
    saved["layers"][1]["type"] = "ACTIVATION"
    next(iter(saved["values"].values()))["y"]["values"][0] += 1
    saved["tensors"]["x"][0] = "HALF"
    net.write_text(json.dumps(saved))
    assert main([str(path), "--against", str(net)]) == 1
    shown = capsys.readouterr().out
    assert "layer ACTIVATION" in shown
    assert "output y differs by" in shown
    assert "input x: HALF" in shown
    assert "agrees; 3 differences from what was saved" in shown.splitlines()[-1]
    net.write_text("{}")
    with pytest.raises(UserError, match="not a network that check --save wrote"):
        main([str(path), "--against", str(net)])


@pytest.mark.seconds
def test_another_weight_is_another_network(tmp_path, capsys):
    """Planted: one weight of the convolution."""
    model, net = picture(), tmp_path / "net.json"
    main([str(save(model, tmp_path, "model")), "--save", str(net)])
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] += 0.5
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    assert main([str(save(model, tmp_path, "model")), "--against", str(net)]) == 1
    shown = capsys.readouterr().out
    assert "crc" in shown
    assert "output y differs by" in shown


def test_a_file_that_is_no_plugin_library_is_one_line(tmp_path):
    (tmp_path / "lib.so").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no plugin library"):
        main([str(save(picture(), tmp_path, "model")), "--plugin", str(tmp_path / "lib.so")])

"""Outputs of one graph to inputs of another: the result computes what both do one after the other."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from foreign_graphs import load
from onnx import TensorProto, helper, numpy_helper

from suture.core.errors import UserError
from suture.core.joined import join as join_models
from suture.core.weights import load_graph, weights_root
from suture.surgery import connect, join
from suture.surgery.__main__ import main as surgery
from suture.surgery.verification import chain

FIRST = """<ir_version: 10, opset_import: ["": 18]> first (float[N, 4] x, float[1] t) => (float[N, 4] h, float[N, 4] extra)
    <float[4, 4] w = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 1, 1, 1, 1}>
    { wave = Sin(t) a = MatMul(x, w) h = Add(a, wave) extra = Neg(a) }"""
SECOND = """<ir_version: 9, opset_import: ["": 18]> second (float[M, 4] h, float[1] t, float[M, 4] y) => (float[M, 4] z)
    <float[4, 4] w = {0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0}>
    { wave = Sin(t) a = MatMul(h, w) b = Mul(a, wave) z = Add(b, y) }"""
BRANCHED = """<ir_version: 10, opset_import: ["": 18]> second (float[M, 4] h, bool a) => (float[M, 4] z)
    { b = Neg(h) z = If(a) < then_branch = one () => (float[M, 4] o) { o = Add(h, b) },
                             else_branch = two () => (float[M, 4] p) { wave = Exp(b) p = Mul(wave, h) }> }"""

PLAIN = """<ir_version: 10, opset_import: ["": 18]> second ({0} h, {1} t) => ({0} y, {1} z) {{ y = Neg(h) z = Neg(t) }}"""


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def saved(folder: Path, *texts: str | onnx.ModelProto) -> list[Path]:
    paths = [folder / f"{name}.onnx" for name in "ab"]
    for path, text in zip(paths, texts):
        onnx.save(parsed(text) if isinstance(text, str) else text, path)
    return paths


def joined(folder: Path, *options: str) -> onnx.ModelProto:
    assert join.main([str(folder / "a.onnx"), str(folder / "b.onnx"), "--out", str(folder / "out"), *options]) == 0
    return onnx.load(folder / "out" / "model.onnx")


def names(values) -> list[str]:
    return [value.name for value in values]


def run(model: onnx.ModelProto | Path, feeds: dict) -> dict:
    session = ort.InferenceSession(str(model) if isinstance(model, Path) else model.SerializeToString())
    return dict(zip(names(session.get_outputs()), session.run(None, feeds)))


def drawn(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def test_equal_names_are_connected_and_shared(tmp_path):
    saved(tmp_path, FIRST, SECOND)
    model = joined(tmp_path)
    assert (names(model.graph.input), names(model.graph.output)) == (["x", "t", "y"], ["extra", "z"])
    assert Counter(node.op_type for node in model.graph.node) == {"Sin": 2, "MatMul": 2, "Add": 2, "Neg": 1, "Mul": 1}
    assert [dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim[:1]] == ["N", "", "N"]
    x, t, y = drawn((3, 4), (1,), (3, 4))
    between = run(parsed(FIRST), {"x": x, "t": t})
    after = run(parsed(SECOND), {"h": between["h"], "t": t, "y": y})
    found = run(model, {"x": x, "t": t, "y": y})
    np.testing.assert_array_equal(found["z"], after["z"])
    np.testing.assert_array_equal(found["extra"], between["extra"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["proof"].startswith("proven in")


def test_surgery_computes_once_what_both_do(tmp_path):
    """The sine of the time that both take."""
    saved(tmp_path, FIRST, SECOND)
    joined(tmp_path)
    assert surgery([str(tmp_path / "out" / "model.onnx"), "--out", str(tmp_path / "portable")]) == 0
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "portable" / "model.onnx").graph.node)
    assert ops["Sin"] == 1


def test_names_that_are_given(tmp_path):
    """`a`, inside the first, is an input of the second, and `wave` is inside both, once in a subgraph."""
    saved(tmp_path, FIRST, BRANCHED)
    model = joined(tmp_path, "--connect", "extra=h", "--keep", "extra", "--rename", "z=x_2")
    assert names(model.graph.input) == ["x", "t", "a"]
    assert names(model.graph.output) == ["h", "extra", "x_2"]
    x, t = drawn((2, 4), (1,))
    between = run(parsed(FIRST), {"x": x, "t": t})
    for flag in (True, False):
        after = run(parsed(BRANCHED), {"h": between["extra"], "a": np.array(flag)})
        found = run(model, {"x": x, "t": t, "a": np.array(flag)})
        np.testing.assert_array_equal(found["x_2"], after["z"])
        np.testing.assert_array_equal(found["extra"], between["extra"])


def test_what_the_second_gives_as_it_takes_it(tmp_path):
    second = '<ir_version: 10, opset_import: ["": 18]> g (float[M, 4] h) => (float[M, 4] h, float[M, 4] z) { z = Neg(h) }'
    saved(tmp_path, FIRST, second)
    model = joined(tmp_path)
    assert names(model.graph.output) == ["extra", "h", "z"]
    x, t = drawn((2, 4), (1,))
    found = run(model, {"x": x, "t": t})
    np.testing.assert_array_equal(found["h"], run(parsed(FIRST), {"x": x, "t": t})["h"])
    np.testing.assert_array_equal(found["h"], -found["z"])


def test_axes_of_one_name_are_one_only_where_they_are(tmp_path):
    """`N` of both: of the first it is the rows of x, of the second the length of y."""
    second = SECOND.replace("float[M, 4] y", "float[N, 4] y").replace("float[M, 4] z", "float[P, 4] z")
    saved(tmp_path, FIRST, second.replace("float[M, 4] h", "float[R, 4] h"))
    inputs = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in joined(tmp_path).graph.input}
    assert inputs == {"x": "N", "t": "", "y": "N_1"}


def test_other_opsets_are_brought_together(tmp_path):
    """ReduceSum of opset 11 has its axes as an attribute, that of 18 as an input."""
    first = parsed(
        '<ir_version: 8, opset_import: ["": 11]> g (float[2, 4] x) => (float[2, 1] h) { h = ReduceSum<axes=[1]>(x) }'
    )
    second = parsed(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 1] h) => (float[1, 1] z) <int64[1] a = {0}> { z = ReduceSum(h, a) }'
    )
    saved(tmp_path, first, second)
    model = joined(tmp_path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    (x,) = drawn((2, 4))
    np.testing.assert_allclose(run(model, {"x": x})["z"], x.sum(keepdims=True), rtol=1e-6)


def external(text: str, file: str, offset: int = 0) -> onnx.ModelProto:
    model = parsed(text)
    (weight,) = model.graph.initializer
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", 64)):
        weight.external_data.add(key=key, value=str(value))
    return model


@pytest.mark.parametrize("large", [False, True])
def test_weights_of_two_folders(tmp_path, monkeypatch, large):
    """Small ones are copied, so that the result stands alone; large ones stay where they are."""
    values = drawn((4, 4), (4, 4))
    for name, text, weight in zip(("one", "two"), (FIRST, SECOND), values):
        (tmp_path / name).mkdir()
        weight.tofile(tmp_path / name / "w.data")
        onnx.save(external(text, "w.data"), tmp_path / name / "model.onnx")
    if large:
        monkeypatch.setattr("suture.core.weights.COPIED_BELOW", 100)
    paths = [str(tmp_path / name / "model.onnx") for name in ("one", "two")]
    out = tmp_path / "out"
    assert join.main([*paths, "--out", str(out)]) == 0
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"model.onnx", "manifest.json"} | (set() if large else {"one/w.data", "two/w.data"})
    model = load_graph(out / "model.onnx")
    onnx.external_data_helper.load_external_data_for_model(model, str(weights_root(out / "model.onnx")))
    x, t, y = drawn((2, 4), (1,), (2, 4))
    expected = (x @ values[0] + np.sin(t)) @ values[1] * np.sin(t) + y
    np.testing.assert_allclose(run(model, {"x": x, "t": t, "y": y})["z"], expected, rtol=1e-5, atol=1e-6)
    assert join.main([*paths, "--out", str(out)]) == 0  # up to date


def test_a_weight_that_both_refer_to_is_one(tmp_path):
    drawn((4, 4))[0].tofile(tmp_path / "w.data")
    saved(tmp_path, external(FIRST, "w.data"), external(SECOND, "w.data"))
    assert len(joined(tmp_path).graph.initializer) == 1


def test_a_stored_encoder_before_an_own_head(tmp_path):
    """CLIP's text encoder, of torch's exporter in float16, into a product of it."""
    encoder = load("clip_text_f16_d18")
    output = encoder.graph.output[0]
    width = output.type.tensor_type.shape.dim[-1].dim_value
    weight = numpy_helper.from_array(np.eye(width, 3, dtype=np.float16), encoder.graph.initializer[0].name)  # a name of both
    value = helper.make_tensor_value_info("states", TensorProto.FLOAT16, None)
    value.type.CopyFrom(output.type)
    head = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["states", weight.name], ["head"])], "head", [value],
            [helper.make_tensor_value_info("head", TensorProto.FLOAT16, None)], [weight],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    saved(tmp_path, encoder, head)
    model = joined(tmp_path, "--connect", f"{output.name}=states", "--keep", output.name)
    assert len(model.graph.node) == len(encoder.graph.node) + 1
    feeds = {value.name: np.ones([dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim], np.int64)
             for value in model.graph.input}  # fmt: skip
    found = run(model, feeds)
    np.testing.assert_allclose(found["head"], found[output.name][..., :3], rtol=1e-3)


@pytest.mark.parametrize(
    ("second", "options", "said"),
    [
        (SECOND.replace("h,", "g,").replace("(h", "(g"), [], "h, extra are none of the inputs g, t, y.*--connect OUTPUT=INPUT"),
        (PLAIN.format("float[M, 5]", "float[1]"), [], r"its h is float \[M, 5\], and h of .*a.onnx float \[N, 4\]"),
        (PLAIN.format("float[4]", "float[1]"), [], r"its h is float \[4\], and h of"),
        (PLAIN.format("float16[M, 4]", "float[1]"), [], "its h is float16"),
        (PLAIN.format("float[M, 4]", "float[2]"), [], "its t is float .2., and t .*; --rename t=NAME keeps them apart"),
        (SECOND.replace("z", "extra"), [], "extra would be extra, as another.*--rename extra=NAME"),
        (SECOND, ["--rename", "z=y"], "z would be y, as another"),
        (SECOND, ["--connect", "no=h"], "has no output no; choose from h, extra"),
        (SECOND, ["--connect", "h=no"], "has no input no; choose from h, t, y"),
        (SECOND, ["--connect", "h=h", "--connect", "extra=h"], "h has one already"),
        (SECOND, ["--rename", "no=z"], "has no input or output no"),
        (SECOND, ["--keep", "no"], "has no output no"),
    ],
)  # fmt: skip
def test_refused(tmp_path, second, options, said):
    saved(tmp_path, FIRST, second)
    with pytest.raises(UserError, match=said) as refusal:
        joined(tmp_path, *options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_functions_of_one_name_and_two_bodies(tmp_path):
    text = '<ir_version: 10, opset_import: ["": 18, "own": 1]> g (float[4] {0}) => (float[4] {1}) {{ {1} = own.f({0}) }}'
    body = '<domain: "own", opset_import: ["": 18]> f (a) => (b) {{ b = {0}(a) }}'
    first, second = (parsed(text.format(*ends) + body.format(op)) for ends, op in ((("x", "h"), "Neg"), (("h", "z"), "Exp")))
    saved(tmp_path, first, second)
    with pytest.raises(UserError, match="its function f is another than"):
        joined(tmp_path)
    del second.functions[:]
    second.functions.extend(first.functions)
    model = join_models(first, second, ("a", "b")).model
    (x,) = drawn((4,))
    np.testing.assert_array_equal(run(model, {"x": x})["z"], x)


def test_a_difference_ends_with_status_1(tmp_path, monkeypatch, capsys):
    """The proof finds what the join does wrong: here a weight that it loses."""
    saved(tmp_path, FIRST, SECOND)

    def wrong(*given):
        result = join_models(*given)
        result.model.graph.initializer[0].float_data[0] = 7
        return result

    monkeypatch.setattr(connect, "join", wrong)
    line = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--out", str(tmp_path / "out")]
    assert join.main(line) == 1
    assert "different: in 'inputs of 2×4" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert join.main([*line, "--no-verify"]) == 0


def test_what_cannot_be_run_is_said(tmp_path, monkeypatch):
    saved(tmp_path, FIRST.replace("Sin(t)", "RandomNormalLike(t)"), SECOND)
    joined(tmp_path)
    proof = json.loads((tmp_path / "out" / "manifest.json").read_text())["proof"]
    assert proof.startswith("not proven: RandomNormalLike")
    monkeypatch.setattr(chain, "is_large", lambda model: True)
    saved(tmp_path, FIRST, SECOND)
    joined(tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["proof"] == "not proven: more than 4 GB of weights"


def test_as_a_command_of_surgery(tmp_path, capsys):
    saved(tmp_path, FIRST, SECOND)
    line = ["join", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--out", str(tmp_path / "out")]
    assert surgery(line) == 0
    assert "h connected, t shared" in capsys.readouterr().out
    assert surgery(line) == 0
    assert "up to date, proven in" in capsys.readouterr().out

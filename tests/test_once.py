"""What depends only on inputs that change rarely, cut into a graph of its own: both compute what the source does."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoder_graphs import decoder_graph
from foreign_graphs import load
from onnx import numpy_helper

from suture.core.errors import UserError
from suture.surgery import capacity, operate
from suture.surgery.__main__ import main
from suture.surgery.operate import DifferenceFound
from suture.validate.pipeline import find_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = """<ir_version: 10, opset_import: ["": 18]> step (float[B, S, 8] x, float[B, T, 8] prompt, float[1] time)
    => (float[B, S, 8] y, float[B, T, 8] seen, float[B, N] rest)
    <int64[1] one = {1}, int64[1] two = {2}, int64[1] eight = {8}, int64[2] ends = {0, 1}, float[1] half = {0.5}>
    { keys = MatMul(prompt, wk) turned = Transpose<perm = [0, 2, 1]>(keys) scores = MatMul(x, turned)
      shares = Softmax(scores) values = MatMul(prompt, wv) mixed = MatMul(shares, values)
      wave = Sin(time) wide = Mul(wave, row) added = Add(mixed, wide) seen = Tanh(values)
      sizes = Shape(prompt) length = Gather(sizes, one) twice = Mul(length, two) rows = Slice(sizes, zero, one)
      flat = Mul(twice, four) shape = Concat<axis = 0>(rows, flat) doubled = Concat<axis = 1>(x, x)
      sum = ReduceSum(x, ends) spread = Mul(sum, half) both = Add(keys, spread) pair = Concat<axis = 2>(both, both)
      halved = Slice(pair, zero, eight, two) rest = Reshape(halved, shape) y = Add(added, x) }"""


def step() -> onnx.ModelProto:
    model = onnx.parser.parse_model(STEP)
    random = np.random.default_rng(0)
    for name, shape in (("wk", (8, 8)), ("wv", (8, 8)), ("row", (8,))):
        model.graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape, np.float32), name))
    for name, value in (("zero", 0), ("four", 4)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    return model


def cut(model: onnx.ModelProto, folder: Path, *options: str) -> dict[str, onnx.ModelProto]:
    """By name, the portable graphs that surgery writes."""
    onnx.save(model, folder / "source.onnx")
    assert main([str(folder / "source.onnx"), "--out", str(folder / "out"), *options]) == 0
    return {path.name: onnx.load(path) for path in sorted((folder / "out").glob("*.onnx")) if ".trt." not in path.name}


def names(values) -> list[str]:
    return [value.name for value in values]


def run(model: onnx.ModelProto, feeds: dict) -> dict:
    session = ort.InferenceSession(model.SerializeToString())
    known = names(session.get_inputs())
    outputs = names(session.get_outputs())
    return dict(zip(outputs, session.run(outputs, {name: value for name, value in feeds.items() if name in known})))


def feeds(rows: int = 2, tokens: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {"x": (rows, tokens, 8), "prompt": (rows, length, 8), "time": (1,)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_two_groups(tmp_path):
    """The prompt's keys and values, and what the time adds, leave the step; an output of the prompt alone is once.onnx's."""
    source = step()
    graphs = cut(source, tmp_path, "--once", "prompt", "--once", "time")
    assert list(graphs) == ["model.onnx", "once.onnx", "once_2.onnx"]
    once, other, rest = graphs["once.onnx"], graphs["once_2.onnx"], graphs["model.onnx"]
    assert (names(once.graph.input), names(other.graph.input)) == (["prompt"], ["time"])
    assert {"seen"} < set(names(once.graph.output))
    assert names(rest.graph.output) == ["y", "rest"]
    assert not {"Tanh", "Sin"} & {node.op_type for node in rest.graph.node}
    assert "time" not in names(rest.graph.input)
    for given in (feeds(), feeds(1, 1, 7)):
        expected = run(source, given)
        found = run(once, given) | run(other, given)
        found |= run(rest, given | found)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["proof"]["complete"]
    assert [note.split(":")[0] for note in report["notes"] if note.startswith("once")] == ["once.onnx", "once_2.onnx"]


def test_sizes_stay_in_the_step(tmp_path):
    """What is read off the prompt's shape is no result of once.onnx: the prompt itself is there to be asked."""
    rest = cut(step(), tmp_path, "--once", "prompt")["model.onnx"]
    assert "prompt" in names(rest.graph.input)
    assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in rest.graph.input)
    axes = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in rest.graph.input}
    assert axes["prompt"] == ["B", "T", ""]


def test_views_and_repetitions_stay_in_the_step(tmp_path):
    """One row of keys for 64 of the picture: the row crosses, not its copies."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[64, 8] x, float[1, 8] p) => (float[64, 8] y) '
        "<int64[2] wide = {64, 8}> { k = Exp(p) e = Expand(k, wide) n = Softmax<axis = 0>(x) y = Mul(e, n) }"
    )
    graphs = cut(model, tmp_path, "--once", "p")
    assert [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graphs["once.onnx"].graph.output] == [
        [1, 8]
    ]


def test_random_numbers_are_drawn_every_step(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 4] x, float[2, 4] p) => (float[2, 4] z) '
        "{ e = Exp(p) noise = RandomNormalLike(e) more = Neg(noise) z = Add(more, x) }"
    )
    graphs = cut(model, tmp_path, "--once", "p")
    ops = {name: {node.op_type for node in graph.graph.node} for name, graph in graphs.items()}
    assert ops == {"once.onnx": {"Exp"}, "model.onnx": {"RandomNormalLike", "Neg", "Add"}}


def test_a_branch_reads_what_both_graphs_compute(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 4] x, float[2, 4] p, bool flag) => (float[2, 4] w) '
        "{ e = Exp(p) s = Neg(x) y = If(flag) < then_branch = a () => (float[2, 4] o) { o = Add(e, s) },"
        " else_branch = b () => (float[2, 4] q) { q = Mul(e, s) }> w = Neg(y) }"
    )
    graphs = cut(model, tmp_path, "--once", "p")
    assert Counter(node.op_type for node in graphs["once.onnx"].graph.node) == {"Exp": 1}
    random = np.random.default_rng(2)
    given = {name: random.standard_normal((2, 4), np.float32) for name in "xp"}
    between = run(graphs["once.onnx"], given)
    for flag in (True, False):
        given["flag"] = np.array(flag)
        found = run(graphs["model.onnx"], given | between)["w"]
        np.testing.assert_allclose(found, run(model, given)["w"], rtol=1e-6)


@pytest.mark.seconds
def test_a_unet(tmp_path):
    """SD 1.5's form, of torch's exporter: the text's keys and values of four cross-attentions, and what the time step adds to
    eight blocks, are no part of the step any more."""
    source = load("sd15_unet_d18")
    sample, time, text = names(source.graph.input)
    graphs = cut(source, tmp_path, "--once", text, "--once", time)
    once, times, rest = graphs["once.onnx"], graphs["once_2.onnx"], graphs["model.onnx"]
    assert (len(once.graph.output), len(times.graph.output)) == (8, 8)
    assert names(rest.graph.input) == [sample, *names(once.graph.output), *names(times.graph.output)]
    ops = [Counter(node.op_type for node in graph.graph.node) for graph in (once, times, rest)]
    assert (ops[0]["Gemm"], ops[1]["Gemm"], ops[2]["Gemm"]) == (8, 10, 32)
    assert (ops[1]["Cos"], ops[2]["Cos"], ops[2]["Attention"]) == (1, 0, 8)
    assert (ops[0]["Transpose"], ops[2]["Transpose"]) == (0, 40)  # into heads, as TensorRT's attention wants it
    random = np.random.default_rng(3)
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in source.graph.input]
    given = {sample: random.standard_normal(shapes[0], np.float32), text: random.standard_normal(shapes[2], np.float32)}
    prompt = run(once, given)
    for step in (999, 17):  # a loop over the schedule, in which the prompt's results stay
        given[time] = np.array([step, step])
        found = run(rest, given | prompt | run(times, given))
        for name, values in run(source, given).items():
            np.testing.assert_allclose(found[name], values, atol=2e-5 * np.abs(values).max())


def test_a_decoder_s_features(tmp_path):
    """Beside a cache that becomes static: here a number of the whole sequence, through a product."""
    model = decoder_graph(static=False)
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    width = logits.type.tensor_type.shape.dim[-1].dim_value
    inner = next(node for node in model.graph.node if "logits" in node.output)
    inner.output[:] = ["plain"]
    model.graph.node.extend([onnx.helper.make_node("Exp", ["features"], ["scale"]),
                             onnx.helper.make_node("Mul", ["plain", "scale"], ["logits"])])  # fmt: skip
    model.graph.input.append(onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, [width]))
    graphs = cut(model, tmp_path, "--once", "features", "--capacity", "16")
    assert [node.op_type for node in graphs["once.onnx"].graph.node] == ["Exp"]
    assert "features" not in names(graphs["model.onnx"].graph.input)
    assert "TensorScatter" in {node.op_type for node in graphs["model.onnx"].graph.node}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["proof"]["complete"]
    with pytest.raises(UserError, match="made with --once"):
        capacity.main([str(tmp_path / "out"), "--capacity", "8", "--out", str(tmp_path / "other")])
    with pytest.raises(UserError, match="is a cache, which every step changes"):
        cut(model, tmp_path, "--once", "past_key_values.0.key")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--once", "no"], "no such input; choose from x, prompt, time"),
        (["--once", "prompt", "prompt"], "named twice"),
        (["--once", "prompt", "--once", "time", "prompt"], "named twice"),
        (["--once", "prompt", "x", "time"], "every output depends on it alone, and no step remains"),
        (["--once", "unused"], "nothing is computed from it alone that a step reads"),
    ],
)
def test_refused(tmp_path, options, said):
    model = step()
    if options == ["--once", "unused"]:
        model.graph.input.append(onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [2]))
    with pytest.raises(UserError, match=said) as refusal:
        cut(model, tmp_path, *options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.seconds
def test_what_is_cut_wrongly_is_found(tmp_path, monkeypatch):
    """The proof takes both graphs together: here two results have changed places."""
    cut_right = operate.cut

    def wrong(*given):
        once, rest, notes = cut_right(*given)
        first, second = [output for output in once[0].gs.outputs if output.shape == once[0].gs.outputs[0].shape][:2]
        first.name, second.name = second.name, first.name
        return once, rest, notes

    monkeypatch.setattr(operate, "cut", wrong)
    onnx.save(load("sd15_unet_d18"), tmp_path / "source.onnx")
    options = operate.SurgeryOptions(once=(("a_2",),))
    with pytest.raises(DifferenceFound, match="conv2d_31 differs"):
        operate.proven(operate.operate(tmp_path / "source.onnx", options), options)


def test_verified_pass_by_pass_and_as_it_was(tmp_path):
    """--verify-all checks the lowering of each graph on its own; without --once, what it wrote goes."""
    graphs = cut(step(), tmp_path, "--once", "prompt", "--verify-all")
    assert "once.onnx" in graphs
    assert "once.onnx" not in cut(step(), tmp_path)
    assert not (tmp_path / "out" / "once.trt.onnx").exists()


def test_validation_of_a_pipeline_says_that_it_takes_none(tmp_path):
    (tmp_path / "export").mkdir()
    onnx.save(step(), tmp_path / "export" / "model.onnx")
    line = [str(tmp_path / "export" / "model.onnx"), "--out", str(tmp_path / "surgery"), "--once", "prompt", "--no-verify"]
    assert main(line) == 0
    with pytest.raises(UserError, match="was made with --once"):
        find_pipeline(tmp_path, None)

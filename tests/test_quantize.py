"""Quantised graphs: what becomes of the products, whether scales that move cancel, who fuses and builds the result."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_surgery import refusal

from contracts.errors import UserError
from contracts.weights import ORT_ROOT_OPTION, load_graph, weights_root
from models import checkpoint_folder
from models.tokenizer import open_tokenizer
from runtime.graphs import from_ort, graph_of, open_graph, open_session, to_ort
from surgery import files
from surgery.__main__ import main
from surgery.quantize.balance import find_groups
from surgery.quantize.feedback import Feedback
from surgery.quantize.formats import FORMATS, FP8, INT4, INT8
from surgery.quantize.inputs import Inputs
from surgery.quantize.linears import find_linears
from surgery.quantize.observe import observe
from surgery.quantize.rounding import block_scales, dequantised, quantise, round_to
from surgery.quantize.slabs import balanced_slabs
from surgery.runner import apply, make_plan
from tests.graphs import weightless
from validate.levels import Pipeline, token_level
from validate.network.compare import compare, default_tolerance
from validate.network.evaluate import Evaluator
from validate.network.inputs import make_feeds
from validate.network.parse import parse
from validate.network.runner import to_numpy
from validate.report import make_report, render

LAYERS, CAPACITY = 4, 64
PRODUCTS = 5 * LAYERS + 1
WEIGHT_ONLY = ("int8", "int4", "int4-awq")
ROUNDED = ("int8-smoothquant", "fp8")


@pytest.fixture(scope="module")
def quantised(tiny_export, tmp_path_factory):
    """The folder of surgery on tiny-qwen with these options, run once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*options: str) -> Path:
        if options not in made:
            out = tmp_path_factory.mktemp("quantised")
            static = [] if "growing" in options else ["--capacity", str(CAPACITY)]
            assert main([str(tiny_export / "model.onnx"), "--out", str(out), *static, *options]) == 0
            made[options] = out
        return made[options]

    return make


def ops(folder: Path) -> dict[str, int]:
    return json.loads((folder / "report.json").read_text())["ops"]["portable"]


def logits(model: Path, level: ort.GraphOptimizationLevel | None = None, **settings: str) -> np.ndarray:
    """Of a prompt, as validation's references compute them, or in a session of its own."""
    if level is None:
        session = open_graph(model).session
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        for key, value in {ORT_ROOT_OPTION: str(weights_root(model)), **settings}.items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feeds = make_feeds(load_graph(model))[0].values
    return session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]


def weights(model: Path) -> dict[str, np.ndarray]:
    """Of each product by its node's name, [in, out], dequantised by numpy from the file's own bytes."""
    proto = onnx.load(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            q, scales = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input[:2])
            block = next((each.i for each in node.attribute if each.name == "block_size"), None)
            found[node.name.removesuffix("/weight")] = q * (np.repeat(scales, block, axis=0) if block else scales)
    return found


def sources(folder: Path) -> dict[str, np.ndarray]:
    """Of each product the weight before it was quantised, [in, out]."""
    proto = onnx.load(folder / "float" / "model.onnx", load_external_data=False)
    onnx.load_external_data_for_model(proto, str(weights_root(folder / "float" / "model.onnx")))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    return {node.name: numpy_helper.to_array(tensors[node.input[1]]).T for node in proto.graph.node if node.op_type == "Gemm"}


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
def test_weights_are_rounded_to_the_nearest(quantised, name, largest):
    folder = quantised("--quantize", name, "--group-size", "64")
    assert ops(folder)["DequantizeLinear"] == ops(folder)["MatMul"] == PRODUCTS
    assert "Gemm" not in ops(folder)
    found, wanted = weights(folder / "model.onnx"), sources(folder)
    assert found.keys() == wanted.keys()
    for node, weight in wanted.items():
        block, most = (len(weight), 127) if node == "lm_head" or name == "int8" else (64, largest)
        steps = np.abs(weight.reshape(-1, block, weight.shape[1])).max(axis=1, keepdims=True) / most
        error = np.abs(found[node] - weight).reshape(-1, block, weight.shape[1])
        assert (error <= steps * 0.5001).all()
        assert error.max() > 0


def test_references_mean_what_they_say_and_default_sessions_do_not(quantised):
    """The reference's logits are those of the same graph over dequantised weights; a default session's are not, since
    onnxruntime then rounds activations to 8 bits, unless told to be accurate."""
    folder = quantised("--quantize", "int4", "--group-size", "64")
    model = folder / "model.onnx"
    proto = onnx.load(folder / "float" / "model.onnx", load_external_data=False)
    onnx.load_external_data_for_model(proto, str(weights_root(folder / "float" / "model.onnx")))
    dequantised, tensors = weights(model), {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Gemm":
            tensors[node.input[1]].CopyFrom(numpy_helper.from_array(dequantised[node.name].T.copy(), node.input[1]))
    feeds = make_feeds(load_graph(model))[0].values
    session = graph_of(proto, folder, "dequantised").session
    exact = session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    everything = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    largest = np.abs(exact).max()
    assert np.abs(logits(model) - exact).max() < 1e-5 * largest
    assert np.abs(logits(model, everything) - exact).max() > 1e-3 * largest
    accurate = logits(model, everything, **{"session.qdq_matmulnbits_accuracy_level": "1"})
    assert np.abs(accurate - exact).max() < 1e-4 * largest


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_onnxruntime_fuses_every_product(quantised, name, tmp_path):
    model = quantised("--quantize", name, "--group-size", "64") / "model.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert found.count("MatMulNBits") == PRODUCTS
    assert "DequantizeLinear" not in found


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED])
def test_tensorrt_understands_every_format(quantised, name):
    """In float32 the parsed network computes the same, but for activations that lie half-way between two numbers."""
    folder = quantised("--quantize", name, "--group-size", "64")
    network = parse(folder / "model.trt.onnx")
    model = load_graph(folder / "model.onnx")
    outcomes = compare(Evaluator(network), folder / "model.onnx", make_feeds(model), 1e-5)
    assert default_tolerance(network) == (0.1 if name in ROUNDED else 1e-5)
    for feeds, outcome in zip(make_feeds(model), outcomes):
        if any(output.beyond(1e-5) for output in outcome.outputs):
            assert name in ROUNDED
            assert_parted_by_rounding(network, model, folder, feeds.values)
    assert not any(output.beyond(0.05) for outcome in outcomes for output in outcome.outputs)


def assert_parted_by_rounding(network, model: onnx.ModelProto, folder: Path, feeds: dict) -> None:
    """The first activations that differ were the same before they were rounded, half-way between two numbers, and went
    to either side: float32 sums in another order differ in their last bits, which is all that it takes."""
    rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.output[0] in network.tensors]
    around = [name for node in rounded for name in (node.input[0], node.output[0])]
    names = [name for name in dict.fromkeys(around) if name in network.tensors]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(model, weights_root(folder / "model.onnx"), "with activations")
    given = {value.name: to_ort(feeds[value.name]) for value in session.get_inputs()}
    expected = dict(zip(names, map(from_ort, session.run_with_ort_values(names, given))))
    found = {key: to_numpy(value) for key, value in Evaluator(network)(feeds, keep=names).items() if key in names}
    for node in rounded:
        ours, theirs = (np.asarray(values[node.output[0]], np.float32) for values in (expected, found))
        if (different := ours != theirs).any():
            break
    before = [values[node.input[0]] for values in (expected, found)]
    assert np.abs(before[0] - before[1]).max() < 1e-5 * np.abs(before[0]).max()
    assert different.mean() < 0.01
    eight_bits = expected[node.output[0]].dtype == np.int8
    step = 1 if eight_bits else np.maximum(np.abs(ours), np.abs(theirs))[different] / 8  # fp8 has 3 bits behind the first
    assert np.all(np.abs(ours - theirs)[different] <= step)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    scaled, halves = before[0] / numpy_helper.to_array(scale), (ours + theirs) / 2
    assert np.abs(scaled - halves)[different].max() < 1e-3 * np.abs(scaled).max()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_value_half_way_goes_to_either_side(name, tmp_path):
    """Why graphs that round activations are allowed more than others: x and its nearest neighbours in float32, half-way
    between two numbers of the small type, become both of them; so what computes x may not differ by a bit."""
    values, half = {"int8": (INT8, 2.5), "fp8": (FP8, 17.0)}[name]
    lower, upper = {"int8": (2, 3), "fp8": (16, 18)}[name]
    zero = TensorProto(name="zero", data_type=values.dtype, raw_data=b"\0")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.array(1, np.float32), "scale"), zero]
    graph = helper.make_graph(nodes, "half", infos[:1], infos[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx")
    half = np.float32(half)
    x = np.array([np.nextafter(half, np.float32(0)), half, np.nextafter(half, np.float32(99))])
    evaluated = to_numpy(Evaluator(parse(tmp_path / "model.onnx"))({"x": x})["y"])
    (run,) = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert evaluated.tolist() == run.tolist() == [lower, lower, upper]  # a tie goes to the even one


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_quantised_cache_grows(quantised, name):
    folder = quantised("--kv-cache", name, "--cache", "growing")
    graph = open_graph(folder / "model.onnx")
    assert graph.signature.dtype == {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[name]
    assert graph.dtype == TensorProto.FLOAT
    lowered = onnx.load(folder / "model.trt.onnx", load_external_data=False)
    made = {output: node for node in lowered.graph.node for output in node.output}
    for cache in graph.signature.caches:
        assert made[cache.present].op_type == "Concat"
        assert made[cache.present].input[0] == cache.past
        assert made[made[cache.present].input[1]].op_type == "QuantizeLinear"
    network = parse(folder / "model.trt.onnx")
    outcomes = compare(Evaluator(network), folder / "model.onnx", make_feeds(load_graph(folder / "model.onnx")), 1e-4)
    for outcome in outcomes:
        assert not [output for output in outcome.outputs if output.beyond(2e-2)], outcome.feeds
    exact, decoders = open_graph(folder / "float" / "model.onnx"), []
    for each in (exact, graph):
        decoder = each.decoder(2)
        tokens = np.arange(40).reshape(2, 20) * 7
        for step in (tokens[:, :12], tokens[:, 12:13], tokens[:, 13:]):
            last = decoder.step(step, np.full(2, step.shape[1]), np.ones(2, np.float32))
        decoders.append(last)
    error = np.abs(decoders[0] - decoders[1]).max() / np.abs(decoders[0]).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("source", ["tiny-qwen", "torch213_dynamo_llama_op23_float16"])
def test_scales_that_move_cancel(tiny_export, tmp_path, source):
    """Where every product's input is divided by numbers and its weight multiplied by them, nothing changes: through
    norms, gated products and, with fewer heads for values than for queries, attention."""
    path = tiny_export / "model.onnx"
    if source != "tiny-qwen":
        path = tmp_path / "model.onnx"
        onnx.save(weightless.load(source), path)
    graph = files.read(path)
    for each in make_plan("static", CAPACITY, "all").portable:
        apply(graph, each)
    before = graph_of(files.to_model(graph), graph.root, "before")
    linears = [linear for linear in find_linears(graph) if not linear.is_head]
    groups = find_groups(graph, linears, fold=True)
    assert all(group.divide is not None for group in groups)
    assert len(groups) == 4 * graph.signature.layers
    random = torch.Generator().manual_seed(0)
    for group in groups:
        scales = group.divide(torch.rand(group.linears[0].features, generator=random) + 0.5)
        for linear in group.linears:
            linear.columns = scales
    for linear in linears:
        rows = torch.cat([rows for _, rows in balanced_slabs(graph, linear)])
        array = (rows if linear.by_output else rows.T).contiguous().numpy().astype(linear.weight.dtype)
        linear.node.inputs[1] = type(linear.weight)(graph.unique("balanced"), array)
        if linear.bias is not None and linear.rows is not None:
            bias = graph.constant(linear.bias) * linear.rows.numpy()
            linear.node.inputs[2] = type(linear.weight)(graph.unique("bias"), bias.astype(array.dtype))
    after = graph_of(files.to_model(graph), graph.root, "after")
    tokens = np.arange(14).reshape(2, 7)
    found = [each.decoder(2).step(tokens, np.full(2, 7), np.ones(2, np.float32)).astype(float) for each in (before, after)]
    tolerance = 1e-5 if graph.signature.dtype == TensorProto.FLOAT else 1e-2
    assert np.abs(found[0] - found[1]).max() < tolerance * np.abs(found[0]).max()
    assert np.abs(found[0]).max() > 0.1


def test_a_segment_at_a_time_sees_the_same(tiny_export):
    graph = files.read(tiny_export / "model.onnx")
    for each in make_plan("static", CAPACITY, "all").portable:
        apply(graph, each)
    wanted = [linear.x for linear in find_linears(graph)]
    windows = np.arange(48).reshape(2, 24)
    seen = []
    for options in ({}, {"segment": 1 << 19}):
        seen.append({tensor.name: [] for tensor in wanted})
        for tensor, values in observe(graph, wanted, windows, **options):
            seen[-1][tensor.name].append(values)
    whole, parts = seen
    for name, values in whole.items():
        assert len(values) == len(parts[name]) == 2
        assert all(np.abs(a - b).max() <= 1e-5 * np.abs(a).max() for a, b in zip(values, parts[name]))


@pytest.mark.parametrize(("values", "block"), [(INT4, 32), (INT8, 64), (FP8, 64)])
def test_rounding_keeps_what_is_exact_and_clips_where_that_helps(values, block):
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 64, generator=random)
    rows[0] = 0
    q, scales = quantise(rows, values, block, TensorProto.FLOAT16)
    assert values.least <= q.min() < 0 < q.max() <= values.largest
    spread = scales.repeat_interleave(block, dim=1)
    again, _ = quantise(q * spread, values, block, TensorProto.FLOAT16)
    assert torch.equal(q[1:], again[1:])
    assert torch.equal(q[0], torch.zeros(64))
    clipped = block_scales(rows, values, block, TensorProto.FLOAT16, torch.ones(64)).repeat_interleave(block, dim=1)
    plain = (q * spread - rows).square().sum()
    better = (round_to(rows / clipped, values) * clipped - rows).square().sum()
    assert better <= plain
    assert better < plain or values is not INT4


@pytest.mark.parametrize(("values", "taken"), [(INT8, False), (INT4, True)])
def test_scales_are_positive(values, taken, tmp_path):
    """TensorRT's reference asks all scales of a dequantising layer to be strictly positive. Its parser refuses others
    beside int8, and says nothing beside int4: so nothing but this rounding sees to it."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    rows[1] = 0
    q, scales = quantise(rows, values, 32, TensorProto.FLOAT)
    assert (scales > 0).all()
    for sign in (1, -1):
        tensors = [helper.make_tensor("q", values.dtype, [64, 4], q.T.to(torch.int8).flatten().tolist()),
                   numpy_helper.from_array(scales.T.contiguous().numpy() * sign, "scales")]  # fmt: skip
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "scales"], ["w"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2, 64]), ("y", [2, 4]))
        ]
        graph = helper.make_graph(nodes, "scales", infos[:1], infos[1:], tensors)
        path = tmp_path / f"{sign}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        if sign == 1 or taken:
            parse(path)
        else:
            with pytest.raises(UserError, match="Scale coefficients must all be positive"):
                parse(path)


def test_later_weights_make_up_for_earlier_ones():
    """The outputs' error on inputs that go together falls far below that of rounding to the nearest; on inputs that do
    not, both are the same."""
    random = torch.Generator().manual_seed(2)
    rows, mixed = torch.randn(48, 600, generator=random), torch.randn(24, 600, generator=random)
    alone, together = torch.eye(600), torch.randn(800, 24, generator=random) @ mixed
    together += 0.1 * torch.randn(together.shape, generator=random)
    nearest, scales = quantise(rows, INT4, 24, TensorProto.FLOAT)
    for x, ratio in ((alone, 1), (together, 0.5)):
        inputs = Inputs.of(600)
        for part in x.split(100):
            inputs.add(part, FORMATS["int4-awq"], 1)
        assert [len(products) for products in inputs.products] == [512, 88]
        q = Feedback(inputs, torch.ones(600)).rounded(rows, scales, INT4)
        assert torch.equal(q, q.round())
        assert q.min() >= -8
        assert q.max() <= 7
        errors = [(x @ (dequantised(each, scales) - rows).T).square().sum() for each in (nearest, q)]
        assert errors[1] <= ratio * errors[0]
        assert (errors[1] == errors[0]) == (ratio == 1)
        exact = (together @ (dequantised(q, scales) - rows).T).square().sum()
        assert x is alone or 0.5 * exact < inputs.error(dequantised(q, scales) - rows) < 2 * exact


def test_the_report_shows_what_the_format_costs(quantised, tiny_export):
    folder = quantised("--quantize", "int4", "--group-size", "64")
    source, files = checkpoint_folder("tiny-qwen"), (tiny_export, folder, folder / "float")
    exported, model, before = (each / "model.onnx" for each in files)
    pipeline = Pipeline(exported, model, before, lowered=None, engine=None, checkpoint=source, text=None, results=None)
    tokenizer, text = open_tokenizer(source), (source / "heldout.txt").read_text(encoding="utf-8")
    portable = open_graph(model, "portable")
    level = token_level(pipeline, portable, tokenizer, tokenizer.encode(text[:4000]))
    cost, (reading,) = level.tokens.cost, level.tokens.readings
    assert cost.before.mean_kl < 1e-6 < 1e-3 < reading.mean_kl
    assert reading.kl_percentiles == sorted(reading.kl_percentiles)
    assert reading.kl_percentiles[99] == pytest.approx(reading.kl_99, rel=1e-4)
    assert 0.15 < cost.bytes["quantised"] / cost.bytes["before"] < 0.3
    html = render(make_report("quantised", [level], {}, 0.0))
    shown = html.split("What quantising costs")[1].split("Greedy continuation")[0]
    assert "int4 in blocks of 64, lm_head int8" in shown
    perplexities = [
        2 ** np.mean(each.bits_by_position[name]) for each, name in ((cost.before, "before"), (reading, "portable"))
    ]
    assert all(f"perplexity {each:.3f}" in shown for each in perplexities)
    level.tokens.cost = None
    assert "What quantising costs" not in render(make_report("plain", [level], {}, 0.0))


def test_what_is_excluded_stays(quantised):
    folder = quantised("--quantize", "int4", "--exclude", "*.h.0.*", "--exclude", "*.h.1.mlp.w?.weight", "--lm-head", "none",
                       "--embedding", "int8")  # fmt: skip
    counts = ops(folder)
    assert counts["Gemm"] == 5 + 2 + 1
    assert counts["DequantizeLinear"] == PRODUCTS - counts["Gemm"] + 1
    assert "Add" in counts  # a bias stays beside its product


def test_one_line_for_what_makes_no_sense(tiny_export, tmp_path, capsys):
    model, out = tiny_export / "model.onnx", ["--out", tmp_path / "out"]
    assert "--exclude nothing*: matches no weight" in refusal(
        capsys, model, *out, "--quantize", "int8", "--exclude", "nothing*"
    )
    assert "add --cache growing" in refusal(capsys, model, *out, "--kv-cache", "int8")
    assert "add --quantize FORMAT" in refusal(capsys, model, *out, "--embedding", "int8")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "too short to calibrate" in refusal(capsys, model, *out, "--quantize", "fp8", "--calibration", short)
    alone = tmp_path / "model.onnx"
    onnx.save(onnx.load(model), alone)
    assert "--tokenizer" in refusal(capsys, alone, *out, "--quantize", "fp8")
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_quantising_says_how_far_it_is(tiny_export, tmp_path, capsys):
    assert main([str(tiny_export / "model.onnx"), "--out", str(tmp_path), "--quantize", "int8"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "writing" in line]
    assert told == ["surgery: writing int8", *(f"surgery: writing int8, {quarter}%" for quarter in (29, 52, 76, 100))]


def test_what_each_format_does_to_text(quantised, tiny_export):
    """Divergence on held-out text: int8 far below int4, and AWQ a fifth below rounding to the nearest at every block."""
    folder = checkpoint_folder("tiny-qwen")
    ids = open_tokenizer(folder).encode((folder / "heldout.txt").read_text(encoding="utf-8"))
    tokens = np.array([ids[start : start + CAPACITY] for start in range(0, 12_000, 1_000)])

    def read(model: Path) -> torch.Tensor:
        logits = (
            open_graph(model)
            .decoder(len(tokens))
            .step(tokens, np.full(len(tokens), CAPACITY), np.ones(len(tokens), np.float32))
        )
        return torch.log_softmax(torch.from_numpy(logits).double(), -1)

    exact = read(quantised("--quantize", "int8", "--group-size", "64") / "float" / "model.onnx")

    def divergence(name: str, block: int) -> float:
        out = quantised("--quantize", name, "--group-size", str(block))
        return float((exact.exp() * (exact - read(out / "model.onnx"))).sum(-1).mean())

    for block in (32, 64, 128):
        assert divergence("int4-awq", block) < 0.8 * divergence("int4", block) < 0.2
    assert 0 < divergence("int8", 64) < 0.02 * divergence("int4", 64)

"""What stands around the passes: capacity, the list of what stayed unfused, pictures, size."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import TensorProto, numpy_helper
from processes import assert_little_memory
from test_surgery_verify import own_pass, saved, state

from suture.core.errors import UserError
from suture.core.proof.steps import STEPS
from suture.core.signature import find_signature
from suture.core.weights import load_graph
from suture.runtime.graphs import open_graph
from suture.surgery import capacity
from suture.surgery.__main__ import main
from suture.surgery.graph import files
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.reports import picture
from suture.surgery.runner import run_plan
from suture.surgery.verification import verify
from suture.validate.compare import compare
from suture.validate.scenarios import make_scenarios, random_tokens
from tests.decoding import decode, largest_error
from tests.graphs import weightless

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Path:
    """A decoder of two layers with a growing cache."""
    return saved(decoder_graph(static=False), tmp_path_factory.mktemp("growing"))


def integers(graph: onnx.GraphProto) -> list[list[int]]:
    """The values of every integer initializer, where a number of slots could be left behind."""
    constants = (numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.INT64)
    return sorted(constant.ravel().tolist() for constant in constants)


# --- capacity ----------------------------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_capacity_changes_without_surgery(growing, tmp_path):
    assert main([str(growing), "--out", str(tmp_path / "16"), "--capacity", "16"]) == 0
    assert main([str(growing), "--out", str(tmp_path / "40"), "--capacity", "40"]) == 0
    capacity.main([str(tmp_path / "16"), "--capacity", "40", "--out", str(tmp_path / "changed")])
    changed, made = open_graph(tmp_path / "changed" / "model.onnx"), open_graph(tmp_path / "40" / "model.onnx")
    assert changed.capacity == 40
    comparison = compare(open_graph(growing), changed, make_scenarios(random_tokens(made.vocab, 0), 40, None))
    assert [scenario.status for scenario in comparison.scenarios] == ["passed"] * len(comparison.scenarios)
    ours, theirs = (load_graph(tmp_path / name / "model.trt.onnx").graph for name in ("changed", "40"))
    assert sorted(node.op_type for node in ours.node) == sorted(node.op_type for node in theirs.node)
    assert list(ours.input) == list(theirs.input)
    assert integers(ours) == integers(theirs)


def test_capacity_lowered_graph_computes_the_same(growing, tmp_path):
    """The lowered graph of 12 slots against the portable one, in onnxruntime: its mask has the new number of slots."""
    assert main([str(growing), "--out", str(tmp_path / "64"), "--capacity", "64"]) == 0
    capacity.main([str(tmp_path / "64" / "model.onnx"), "--capacity", "12", "--out", str(tmp_path / "12")])
    portable, lowered = (state(load_graph(tmp_path / "12" / name)) for name in ("model.onnx", "model.trt.onnx"))
    assert len(portable.outputs) == len(STEPS)
    assert verify.compare("lowered", portable, portable, lowered) < 1e-5


@pytest.mark.seconds
def test_capacity_of_a_graph_with_a_bias_over_slots(tmp_path):
    """ALiBi's bias reads the capacity from the cache."""
    onnx.save(weightless.load("bloom-dynamo-18-float32"), tmp_path / "source.onnx")
    main([str(tmp_path / "source.onnx"), "--out", str(tmp_path / "small"), "--capacity", "32"])
    capacity.main([str(tmp_path / "small"), "--capacity", "64", "--out", str(tmp_path / "large")])
    small, large = (onnx.load(tmp_path / name / "model.onnx") for name in ("small", "large"))
    assert largest_error(decode(small, alone=False), decode(large, alone=False)) < 1e-6


def test_capacity_refuses(growing, tmp_path):
    out = ["--capacity", "8", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="run surgery on it first"):
        capacity.main([str(growing), *out])
    assert main([str(growing), "--out", str(tmp_path / "s"), "--capacity", "16"]) == 0
    with pytest.raises(UserError, match="is lowered"):
        capacity.main([str(tmp_path / "s" / "model.trt.onnx"), *out])
    with pytest.raises(SystemExit, match="2"):
        capacity.main([str(tmp_path / "s"), "--capacity", "0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_capacity_runs_no_code_that_a_manifest_names(growing, tmp_path):
    """Nor code that the command line names and the graph was not made with."""
    own = tmp_path / "own.py"
    own.write_text(f"'''Nothing.'''\nopen({str(tmp_path / 'ran')!r}, 'a')\n\ndef run(graph):\n    return 0\n")
    assert main([str(growing), "--out", str(tmp_path / "s"), "--capacity", "16"]) == 0
    out = [str(tmp_path / "s"), "--capacity", "8", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="leave --pass out"):
        capacity.main([*out, "--pass", str(own)])
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["own"] = [str(own)]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"give --pass {own}, if they are yours"):
        capacity.main(out)
    assert not (tmp_path / "ran").exists()
    capacity.main([*out, "--pass", str(own)])
    assert (tmp_path / "ran").exists()


# --- what stayed unfused -----------------------------------------------------------------------------------------------


def test_unfused_names_the_finished_node_and_the_condition(growing):
    """A near miss is recorded under the name that its node had then, and reported under the one it has now."""
    graph = files.read(growing)
    concat = graph.nodes("Concat")[0]
    concat.attrs["axis"] = 1  # the cache of layer 0's keys grows along its heads
    portable, _, report = run_plan(graph, make_plan(SurgeryOptions(capacity=64)))
    stayed = next(node for node in portable.gs.nodes if node.outputs[0].name == "present.0.key")
    said = next(each for each in report.unfused if each["node"] == stayed.name)
    assert (said["op"], said["pass"]) == ("Concat", "static_cache")
    assert "axis 1" in said["reason"]
    assert report.unfused[0]["pass"] == "static_cache"
    assert any(line.startswith("not fused: Concat at ") and "axis 1" in line for line in report.lines())
    assert {each["node"] for each in report.unfused} <= {node.name for node in portable.gs.nodes}


def test_alike_misses_are_one_line(tiny_export):
    _, _, report = run_plan(files.read(tiny_export / "model.onnx"), make_plan(SurgeryOptions(capacity=64, skip=("swish",))))
    assert [each["op"] for each in report.unfused] == ["Sigmoid"] * 4
    (line,) = report.lines()
    assert line == f"not fused: Sigmoid at {report.unfused[0]['node']} and 3 more (no pass knows this form)"


def test_a_rotation_written_out_is_said(tiny_export):
    _, _, report = run_plan(
        files.read(tiny_export / "model.onnx"), make_plan(SurgeryOptions(capacity=64, skip=("rotary_embedding",)))
    )
    assert [each["op"] for each in report.unfused] == ["Cos"]


# --- the picture -------------------------------------------------------------------------------------------------------


def test_picture_of_a_layer(tiny_export, tmp_path):
    assert main([str(tiny_export / "model.onnx"), "--out", str(tmp_path), "--capacity", "64"]) == 0
    texts = {}
    for name in ("before", "after"):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        texts[name] = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Softmax" in texts["before"]
    assert texts["after"].count("Attention") == 1
    assert texts["after"].count("RMSNormalization") == 2
    assert texts["after"].count("TensorScatter") == 2
    assert {"past key", "past value", "present key", "present value"} <= set(texts["before"]) & set(texts["after"])
    assert "Softmax" not in texts["after"]


def test_no_picture_where_names_say_nothing(growing):
    graph = files.read(growing)
    for number, node in enumerate(graph.gs.nodes):
        node.name = f"node_{number}"
    assert picture.draw_layer(graph, 1, "") is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [("layers.3/attention", 3), ("transformer.h.12.attn/MatMul", 12), ("/model/layers.0/self_attn/Add", 0),
     ("/model/layers.1/attn/qkv_proj/MatMul", 1), ("final_norm/mul", None), ("node_add_7", None)],
)  # fmt: skip
def test_layer_of_a_name(name, layer):
    assert picture.layer_of(name) == layer


# --- size --------------------------------------------------------------------------------------------------------------


def test_repeated_layers_come_out_alike(tiny_export, tmp_path):
    """The benchmark's large graphs are true ones: every copy of a layer runs, and is fused like the first."""
    grown = tmp_path / "model.onnx"
    repeat = [sys.executable, "-m", "benchmarks.repeat_layer", str(tiny_export / "model.onnx"), str(grown), "600"]
    subprocess.run(repeat, cwd=ROOT, check=True)
    assert main([str(grown), "--out", str(tmp_path / "out"), "--capacity", "16"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    layers = report["ops"]["portable"]["Attention"]
    assert layers > 4
    assert report["ops"]["portable"]["RMSNormalization"] == 2 * layers + 1
    assert report["ops"]["portable"]["TensorScatter"] == 2 * layers
    assert find_signature(load_graph(grown)).layers == layers


@pytest.mark.slow
def test_memory_does_not_grow_with_the_weights(tmp_path):
    """A weight of 4 GB that is not there, but for its size: a hole in a file. Whoever read it would need 4 GB."""
    model = decoder_graph(static=False)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "embed")
    rows = (4 << 30) // (4 * table.dims[1])
    table.Clear()
    table.name, table.data_type, table.data_location = "embed", TensorProto.FLOAT, TensorProto.EXTERNAL
    table.dims.extend([rows, 32])
    for key, value in (("location", "weights.bin"), ("offset", 0), ("length", 4 << 30)):
        table.external_data.add(key=key, value=str(value))
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(4 << 30)
    path = saved(model, tmp_path)
    line = [path, "--out", tmp_path / "out"]
    assert_little_memory(line)


def test_the_documented_pass_works(tmp_path):
    """docs/own_pass.md's own pass, on a graph with a Clip that does nothing, one that does something, and a near miss."""
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_pass.md").read_text(), re.DOTALL)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x, float most) => (float[2] y) '
        "{ a = Clip(x, low, high) b = Clip(a, low, one) y = Clip(b, low, most) }"
    )
    bounds = {"low": -np.inf, "high": np.inf, "one": 1.0}
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in bounds.items())
    own = own_pass(tmp_path, code)
    assert main([str(saved(model, tmp_path)), "--out", str(tmp_path / "out"), "--pass", str(own), "--verify"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ops"]["portable"] == {"Clip": 2}
    assert [each["reason"] for each in report["unfused"]] == ["a bound is computed"]

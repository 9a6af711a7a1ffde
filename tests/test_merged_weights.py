"""--merge: the products of query, key and value, of gate and up, as one, over weights merged in a file of their own."""

import json
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from processes import assert_little_memory

from suture.core.manifest import read_manifest
from suture.core.sessions import ROOT_OPTION
from suture.core.weights import references
from suture.surgery.__main__ import main
from suture.surgery.graph import files
from suture.surgery.graph.weights import settle
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.runner import run_plan
from tests.decoding import decode, largest_error
from tests.graphs import weightless
from tests.graphs.retype import retyped

ROOT = Path(__file__).parents[1]
BOTH = ("qkv", "gate-up")
# Gemms before and after merging both; Phi-3's checkpoint has them packed, OPT and Whisper have no gate, a cross-attention's
# keys and values belong to the encoder, GPT-NeoX's MLP reads the same rows as its packed attention
GEMMS = {
    "torch213_torchscript_qwen2_op17_float32": (15, 9),
    "llama-dynamo-24-float16": (15, 9),
    "qwen3-dynamo-23-float32": (15, 9),
    "gemma-dynamo-18-float32": (15, 9),
    "opt-torchscript-17-float32": (13, 9),
    "whisper-dynamo-18-float32": (17, 13),
    "phi3-dynamo-18-float32": (9, 9),
    "gptneox-torchscript-17-float32": (9, 9),
}


def operated(source: onnx.ModelProto, folder: Path, merge: tuple[str, ...]):
    """The portable graph with these weights merged, and what the pass said."""
    onnx.save(source, folder / "source.onnx")
    portable, lowered, report = run_plan(
        files.read(folder / "source.onnx"), make_plan(SurgeryOptions(capacity=32, merge=merge))
    )
    said = [each for each in report.passes if each.name == "merged_weights"]
    return files.to_model(portable), files.to_model(lowered), said


def ops(model: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.sample(3)
@pytest.mark.seconds
def test_merging_changes_no_number(name, tmp_path):
    source = weightless.load(name)
    (apart, _, none), (merged, lowered, (said,)) = (operated(source, tmp_path, merge) for merge in ((), BOTH))
    assert none == []
    assert said.near_misses == []
    before, after = GEMMS[name]
    assert (ops(apart)["Gemm"], ops(merged)["Gemm"]) == (before, after)
    assert ops(merged)["Split"] - ops(apart)["Split"] == said.matches
    assert ops(lowered)["TRT_Attention"] == ops(merged)["Attention"]
    onnx.checker.check_model(merged, full_check=True)
    expected, got = (decode(model, alone=False) for model in (apart, merged))
    assert largest_error(expected, got) < (1e-3 if name.endswith("float16") else 1e-6)
    named = [node.name for node in merged.graph.node if re.fullmatch(r"layers\.\d/.*\.(qkv|gate_up)", node.name)]
    assert len(named) == said.matches
    unused = {tensor.name for tensor in merged.graph.initializer} - {each for node in merged.graph.node for each in node.input}
    assert not unused


@pytest.mark.parametrize(("kind", "gemms", "rotations"), [("qkv", 11, 2), ("gate-up", 13, 4)])
@pytest.mark.seconds
def test_each_on_its_own(kind, gemms, rotations, tmp_path):
    """Merged projections are rotated together in the lowered graph, as packed ones are."""
    merged, lowered, _ = operated(weightless.load("torch213_torchscript_qwen2_op17_float32"), tmp_path, (kind,))
    assert ops(merged)["Gemm"] == gemms
    assert ops(lowered)["RotaryEmbedding"] == rotations


def test_quantised_weights_stay_apart_and_say_so(tmp_path):
    source = weightless.load("genai/llama-int4-asymmetric")
    apart, merged = (operated(source, tmp_path, merge) for merge in ((), BOTH))
    assert ops(apart[0]) == ops(merged[0])
    assert [miss.reason.endswith("is quantised") for miss in merged[2][0].near_misses] == [True] * 4


# --- weights in files --------------------------------------------------------------------------------------------------


def sharded(model: onnx.ModelProto, folder: Path, shards: int) -> Path:
    """Saves the graph as export does: matrices in `shards` files of a checkpoint elsewhere, as a manifest says."""
    checkpoint, graph = folder / "checkpoint", folder / "export"
    for path in (checkpoint, graph):
        path.mkdir()
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    for index, tensor in enumerate(matrices):
        location = f"model-{index % shards + 1:05}-of-{shards:05}.safetensors"
        raw = tensor.raw_data
        with open(checkpoint / location, "ab") as file:
            offset = file.write(b"8 bytes!") if file.tell() == 0 else file.tell()
            file.write(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, graph / "model.onnx")
    content = {f"../checkpoint/{file.name}": {"sha256": sha256(file.read_bytes()).hexdigest()} for file in checkpoint.iterdir()}
    manifest = {"weights_root": "../checkpoint", "outputs": {"model.onnx": 0}, "content": content}
    (graph / "manifest.json").write_text(json.dumps(manifest))
    return graph / "model.onnx"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.sample("bfloat16")
@pytest.mark.seconds
def test_merged_weights_go_to_one_new_file_with_all_others(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("suture.surgery.graph.weights.INLINE", 1 << 10)
    monkeypatch.setattr("suture.surgery.graph.weights.SLAB", 1000)  # many slabs, none of which ends with a row
    name = "llama-dynamo-24-float16" if dtype == "float16" else "torch213_torchscript_qwen2_op17_float32"
    source = weightless.load(name)
    expected = decode(source, alone=True)
    path = sharded(retyped(source, TensorProto.BFLOAT16) if dtype == "bfloat16" else source, tmp_path, 8)
    before = {each: each.stat().st_size for each in tmp_path.rglob("*") if each.is_file()}
    out = tmp_path / "out"
    assert main([str(path), "--out", str(out), "--capacity", "32", "--merge", *BOTH, "--verify"]) == 0
    assert {each: each.stat().st_size for each in before} == before
    assert read_manifest(out)["weights_root"] == "."
    assert sorted(each.suffix for each in out.iterdir() if each.suffix not in (".json", ".svg")) == [".data", ".onnx", ".onnx"]
    portable, lowered = (onnx.load(out / f"{stem}.onnx", load_external_data=False) for stem in ("model", "model.trt"))
    assert ops(portable)["Gemm"] == ops(lowered)["Gemm"] == 9
    shared = [{tensor.name: tuple(place.values()) for tensor, place in references(model)} for model in (portable, lowered)]
    assert shared[0] == shared[1]
    matrices = sum(int(length) for _, _, length in set(shared[0].values()))
    assert (out / "repacked.data").stat().st_size < matrices + 4096 * len(shared[0])  # nothing twice
    if dtype != "bfloat16":
        got = decode(portable, alone=False, root=out)
        assert largest_error(expected, got) < (2e-2 if dtype == "float16" else 1e-4)
    options = ort.SessionOptions()
    options.add_session_config_entry(ROOT_OPTION, str(out))
    if dtype == "float32":
        ort.InferenceSession(out / "model.onnx", options)


@pytest.mark.seconds
def test_a_difference_leaves_merged_weights_in_a_file_too(tmp_path, monkeypatch, capsys):
    """A pass that goes wrong behind the merging, bisected: both graphs run, and hold no weights themselves."""
    monkeypatch.setattr("suture.surgery.graph.weights.INLINE", 1 << 10)
    path = sharded(weightless.load("torch213_torchscript_qwen2_op17_float32"), tmp_path, 2)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        '"""Swish(x) → Swish(x) with another alpha"""\n'
        "def run(graph):\n"
        "    return graph.match(lambda graph, node: node.attrs.update(alpha=2.0) or True, graph.nodes('Swish'))\n"
    )
    out = tmp_path / "out"
    arguments = [str(path), "--out", str(out), "--capacity", "32", "--merge", *BOTH, "--bisect", "--pass"]
    assert main([*arguments, f"{wrong}@merged_weights"]) == 1
    assert "wrong, match 1 of 2, at " in capsys.readouterr().out
    assert [each.name for each in out.iterdir()] == ["difference"]
    models = [onnx.load(out / "difference" / f"{name}.onnx", load_external_data=False) for name in ("before", "after")]
    assert all(model.ByteSize() < 40_000 for model in models)
    before, after = (decode(model, alone=False, root=out / "difference") for model in models)
    assert largest_error(before, after) > 1e-4


def gated(names: list[str], folder: Path, gap: bytes = b"") -> Path:
    """A gated MLP whose two weights lie in one file in this order."""
    text = """<ir_version: 11, opset_import: ["": 24]> gated (float[tokens, 8] x) => (float[tokens, 16] logits) {
        a = Gemm<transB = 1>(x, gate)  s = Swish(a)  b = Gemm<transB = 1>(x, up)  logits = Mul(s, b) }"""
    model = onnx.parser.parse_model(text)
    first, second = np.random.default_rng(0).standard_normal((2, 16, 8), np.float32)
    (folder / "model.bin").write_bytes(b"8 bytes!" + first.tobytes() + gap + second.tobytes())
    for name, offset in zip(names, (8, 8 + 512 + len(gap))):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[16, 8], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "model.bin"), ("offset", offset), ("length", 512)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("names", [["gate", "up"], ["up", "gate"]])
@pytest.mark.parametrize("asked", [True, False])
def test_neighbours_in_a_file_are_merged_by_reference(names, asked, tmp_path, monkeypatch):
    """As gate and up of Qwen-7B's shards are: no byte is written, whichever comes first. In the lowered graph always."""
    monkeypatch.setattr("suture.core.tensors.EMBEDDED", 0)  # whose tensors stay in their file, however small
    out = tmp_path / "out"
    assert main([str(gated(names, tmp_path)), "--out", str(out), *["--merge", "gate-up"] * asked]) == 0
    assert [path.name for path in out.iterdir() if path.suffix in (".bin", ".data")] == ["model.bin"]
    portable, lowered = (onnx.load(out / f"{stem}.onnx", load_external_data=False) for stem in ("model", "model.trt"))
    assert ops(portable) == Counter(
        {"Swish": 1, "Mul": 1, "Gemm": 1, "Split": 1} if asked else {"Swish": 1, "Mul": 1, "Gemm": 2}
    )
    assert ops(lowered) == {"Gemm": 1, "Reshape": 3, "Split": 1, "Swish": 1, "Mul": 1}
    ((_, place),) = references(lowered)
    assert (place["offset"], place["length"]) == ("8", "1024")
    x = np.random.default_rng(1).standard_normal((3, 8), np.float32)
    files_of = (tmp_path / "model.onnx", out / "model.onnx", out / "model.trt.onnx")
    before, *after = (ort.InferenceSession(path).run(None, {"x": x})[0] for path in files_of)
    for each in after:
        np.testing.assert_allclose(each, before, rtol=1e-5)


def test_what_is_apart_in_its_file_stays_apart_unless_asked(tmp_path):
    out = tmp_path / "out"
    assert main([str(gated(["gate", "up"], tmp_path, gap=b"4567")), "--out", str(out)]) == 0
    assert ops(onnx.load(out / "model.trt.onnx", load_external_data=False))["Gemm"] == 2
    passes = {each["name"]: each for each in json.loads((out / "report.json").read_text())["passes"]}
    (miss,) = passes["neighbouring_weights"]["near_misses"]
    assert miss["reason"] == "its weights do not follow one another in a file"


def test_neighbours_that_are_copied_are_copied_once(tmp_path):
    """Beside a new weight, all others are copied: of the portable graph gate and up, of the lowered one both as one."""
    portable = onnx.load(gated(["gate", "up"], tmp_path), load_external_data=False)
    lowered = onnx.ModelProto.FromString(portable.SerializeToString())
    gate, up = lowered.graph.initializer
    gate.dims[:], gate.external_data[2].value = [32, 8], "1024"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "repacked.data").write_bytes(b"new!")
    up.external_data[0].value, up.external_data[1].value = str(folder / "repacked.data"), "0"
    up.dims[:], up.external_data[2].value = [1], "4"
    added = {str(folder / "repacked.data")}
    assert settle([portable, lowered], tmp_path, tmp_path / "model.onnx", folder, folder, added) == "."
    assert (folder / "repacked.data").stat().st_size == 4096 + 1024
    places = [[tuple(place.values()) for _, place in references(model)] for model in (portable, lowered)]
    assert places[0] == [("repacked.data", "4096", "512"), ("repacked.data", "4608", "512")]
    assert places[1] == [("repacked.data", "4096", "1024"), ("repacked.data", "0", "4")]
    assert (folder / "repacked.data").read_bytes()[4096:] == (tmp_path / "model.bin").read_bytes()[8:]


@pytest.mark.slow  # test_surgery_tools.py has one of the kind
def test_memory_does_not_grow_with_merged_weights(tmp_path):
    """Query, key and value of 128 MB each, as holes in files: copied, they would be memory."""
    features, outputs = 8192, 4096
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", name], [f"{name}_rows"]),
            helper.make_node("Reshape", [f"{name}_rows", "heads"], [f"{name}_heads"]),
            helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_first"], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Attention", ["q_first", "k_first", "v_first"], ["attended"]),
        helper.make_node("Reshape", ["attended", "rows"], ["logits"]),
    ]
    of, shapes = helper.make_tensor_value_info, {"heads": [1, -1, 32, 128], "rows": [1, -1, 4096]}
    graph = helper.make_graph(
        nodes, "encoder", [of("x", TensorProto.FLOAT, ["tokens", features])],
        [of("logits", TensorProto.FLOAT, [1, "tokens", outputs])],
        [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    for name in "qkv":
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[features, outputs])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"{name}.bin"), ("offset", 0), ("length", 4 * features * outputs)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(4 * features * outputs)
    onnx.save(model, tmp_path / "model.onnx")
    line = [tmp_path / "model.onnx", "--out", tmp_path / "out", "--merge", "qkv"]
    assert_little_memory(line)
    assert (tmp_path / "out" / "repacked.data").stat().st_size == 3 * 4 * features * outputs

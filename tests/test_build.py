"""build/: real engines of small decoders, built with TensorRT-RTX on the CPU, and what stops a build."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import build.__main__ as build_main
from build import flavour
from build.audit import audit_graph
from build.cost import add_cost, describe_graph, kernels_a_layer, over_floor
from build.kernels import read_kernels
from build.memory import estimate, refuse_what_cannot_fit
from build.precisions import supported
from build.process import build
from build.profiles import make_profiles
from build.progress import Fraction
from build.worker import Job
from contracts.errors import UserError
from contracts.signature import find_signature

ROOT = Path(__file__).parents[1]


def run_build(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "build", str(model), "--out", str(out), "--compute-capability", "8.9", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "model.trt.onnx")
    return folder / "model.trt.onnx"


def fails_with(proto: onnx.ModelProto, folder: Path, *options: str) -> str:
    """The one line that a build of `proto` ends with."""
    result = run_build(saved(proto, folder), folder / "out", *options)
    assert result.returncode == 2, result.stderr
    assert not list((folder / "out").glob("**/*"))
    (line,) = result.stderr.splitlines()
    assert str(folder) in line
    return line


def job(proto: onnx.ModelProto, folder: Path) -> Job:
    """A build of `proto` that skips the audit of the graph, so that only the network's is at work."""
    signature = find_signature(proto)
    profiles = make_profiles(proto, signature, split=True, batch=2, prompt=16, past=64)
    model = saved(proto, folder)
    return Job(model, folder, folder / "model.engine", "rtx", ("8.9",), signature, profiles, frozenset())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder that one build of a two-layer float16 decoder wrote."""
    folder = tmp_path_factory.mktemp("built")
    result = run_build(saved(build_graphs.decoder(layers=2), folder), folder / "out")
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_engine_json_says_what_was_built(built):
    engine = json.loads((built / "engine.json").read_text())
    assert engine["tensorrt"] == {"flavour": "rtx", "version": flavour.load("rtx").__version__}
    assert engine["compute_capabilities"] == ["8.9"]
    assert engine["engine_bytes"] == (built / "model.engine").stat().st_size > 1_000_000
    inputs = {tensor["name"]: tensor for tensor in engine["inputs"]}
    assert inputs["input_ids"] == {"name": "input_ids", "dtype": "int64", "shape": [-1, -1], "role": "tokens"}
    assert inputs["past_key_values.1.value"] == {
        "name": "past_key_values.1.value", "dtype": "float16", "shape": [-1, 4, 64, 32],
        "role": "cache", "same_buffer_as": "present.1.value",
    }  # fmt: skip
    assert [profile["name"] for profile in engine["profiles"]] == ["decode", "prompt"]
    assert engine["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [1, 1], [4, 1]]
    assert engine["profiles"][1]["shapes"]["input_ids"] == [[1, 1], [1, 64], [4, 64]]
    assert engine["profiles"][1]["shapes"]["past_key_values.0.key"][2] == [4, 4, 64, 32]
    assert (engine["layers"]["ATTENTION_INPUT"], engine["layers"]["KV_CACHE_UPDATE"]) == (2, 4)
    assert engine["memory"]["estimated"]["caches"] == 4 * 2 * 2 * 4 * 64 * 32 * 2
    assert len(engine["memory"]["activations"]) == 2
    assert engine["seconds"]["build"] > 0
    assert engine["peak_memory_bytes"] > 10_000_000


def test_kernels_json_lists_one_fused_attention_a_layer(built):
    decode, prompt = json.loads((built / "kernels.json").read_text())["profiles"]
    for profile, attention in ((decode, "_gemv_mha"), (prompt, "_gemm_mha")):
        kernels = [entry for entry in profile["entries"] if entry["kernel"]]
        fused = [entry for entry in kernels if entry["name"].startswith(attention)]
        assert [entry["onnx_nodes"] for entry in fused] == [["attention_0"], ["attention_1"]]
        assert profile["kernels"] == len(kernels) == sum(profile["by_type"].values())
        assert {"shape": [-1, 4, 64, 32], "dtype": "half"}.items() <= fused[0]["inputs"][1].items() or profile is prompt
        weights = {constant["name"] for entry in kernels for constant in entry["constants"]}
        assert any(name.startswith("0.down.weight") for name in weights)
    assert decode["kernels"] == 20  # nine a layer, the embedding's norm with the first, last norm and head
    assert prompt["kernels"] > decode["kernels"]


def test_decode_step_moves_little_more_than_the_floor(built):
    engine = json.loads((built / "engine.json").read_text())
    decode, prompt = engine["profiles"]
    assert (decode["kernels_by_layer"], decode["kernels_outside_layers"]) == ({}, 20)  # this graph's names say no layer
    # by hand: two layers of q, k, v, o, gate, up, down and two norms, last norm, head, one row of the embedding; two
    # rows of rotary tables and the mask's numbers; the caches; the logits
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128 + 512 * 128 + 128
    at_least = 2 * (weights + 2 * 2 * 4 * 64 * 32 + 512)
    assert at_least <= decode["floor_bytes"] <= at_least + 1500
    assert decode["copied_bytes"] == 0
    assert sum(decode["decode_bytes"].values()) < 1.06 * decode["floor_bytes"]
    assert prompt["copied_bytes"] == 2 * 2 * 2 * 4 * 64 * 32 * 2  # its attention wants the caches in another layout
    (finding,) = engine["findings"]
    assert (finding["severity"], finding["where"]) == ("note", "profile prompt")
    assert "4 kernels copy caches, 0.1 MB a step; the first is __myl_Resh" in finding["what"]


def test_second_run_is_up_to_date(built):
    before = (built / "model.engine").stat().st_mtime_ns
    result = run_build(built.parent / "model.trt.onnx", built)
    assert result.returncode == 0
    assert "up to date" in result.stdout
    assert (built / "model.engine").stat().st_mtime_ns == before
    assert "up to date" not in run_build(built.parent / "model.trt.onnx", built, "--max-batch", "2", "--force").stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_builds_in_other_types(dtype, tmp_path):
    proto = build_graphs.decoder(dtype)
    result = build(job(proto, tmp_path))
    assert result["findings"] == []
    assert next(tensor for tensor in result["outputs"] if tensor["name"] == "logits")["dtype"] == dtype
    assert "_gemv_mha_v1" in result["kernels"][0]["entries"][8]["name"]


def test_float32_attention_is_made_decomposable(tmp_path):
    proto = build_graphs.decoder("float32")
    for node in proto.graph.node:
        if node.op_type == "TRT_Attention":
            del node.attribute[:]
    assert build(job(proto, tmp_path))["layers"]["ATTENTION_INPUT"] == 1


def test_weights_as_inputs_are_bound_from_the_checkpoint(tmp_path):
    proto = build_graphs.decoder()
    down = numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "0.down.weight"))
    model = build_graphs.by_reference(proto, tmp_path / "surgery", tmp_path / "checkpoint")
    constant, bound = tmp_path / "constant", tmp_path / "bound"
    assert run_build(model, constant).returncode == 0
    result = run_build(model, bound, "--weights", "input")
    assert result.returncode == 0, result.stderr
    engine = json.loads((bound / "engine.json").read_text())
    weights = {weight["name"]: weight for weight in engine["weights"]["inputs"]}
    assert {tensor["name"] for tensor in engine["inputs"] if tensor["role"] == "weight"} == set(weights)
    assert "0.norm1.weight" not in weights
    weight = weights["0.down.weight"]
    path = bound / engine["weights"]["root"] / weight["file"]
    read = np.fromfile(path, weight["dtype"], down.size, offset=weight["offset"]).reshape(weight["shape"])
    np.testing.assert_array_equal(read, down)
    assert (bound / "model.engine").stat().st_size < (constant / "model.engine").stat().st_size - weight["bytes"]
    # its Transpose keeps the head a constant, and that is said
    assert [finding["where"] for finding in engine["findings"] if finding["severity"] == "warning"] == ["weight head.weight"]


def test_truncated_weights(tmp_path):
    model = build_graphs.by_reference(build_graphs.decoder(), tmp_path / "surgery", tmp_path / "checkpoint")
    os.truncate(tmp_path / "checkpoint" / "model.safetensors", 100_000)
    result = run_build(model, tmp_path / "out")
    assert (result.returncode, "truncated" in result.stderr) == (2, True)


def test_dropped_lengths_stop_the_build(tmp_path):
    line = fails_with(build_graphs.decoder(attention="nonpad"), tmp_path)
    assert "attention_0" in line
    assert "nonpad_kv_seqlen" in line
    assert "surgery" in line


def test_what_the_parser_drops_is_found_in_the_network_too(tmp_path):
    proto = build_graphs.decoder(attention="nonpad")
    lengths = next(node for node in proto.graph.node if node.op_type == "Attention").input[6]
    with pytest.raises(UserError, match=f"node {lengths}: TensorRT's parser drops it, though Attention attention_0"):
        build(job(proto, tmp_path))
    node = next(node for node in proto.graph.node if lengths in node.output)
    proto.graph.node.remove(node)
    proto.graph.input.append(helper.make_tensor_value_info(lengths, TensorProto.INT64, ["batch"]))
    with pytest.raises(UserError, match=f"input {lengths}: TensorRT's parser drops it"):
        build(job(proto, tmp_path))


def test_causal_attention_over_a_cache_stops_the_build(tmp_path):
    assert "attention_0: is_causal" in fails_with(build_graphs.decoder(attention="causal"), tmp_path)


def test_causal_attention_without_a_cache_is_no_finding():
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 4, 8, 32]) for name in "qkv"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    assert audit_graph(build_graphs.model([node], values, values[:0]), None) == []


def test_unused_input_and_weight_stop_the_build(tmp_path):
    proto = build_graphs.decoder()
    proto.graph.input.append(helper.make_tensor_value_info("kv_lengths", TensorProto.INT64, ["batch"]))
    assert "input kv_lengths: nothing in the graph uses it" in fails_with(proto, tmp_path)
    proto.graph.input.pop()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "forgotten"))
    assert "weight forgotten: nothing in the graph uses it" in fails_with(proto, tmp_path)


def test_foreign_domain_stops_the_build(tmp_path):
    proto = build_graphs.decoder()
    next(node for node in proto.graph.node if node.op_type == "RMSNormalization").domain = "some.vendor"
    assert "some.vendor::RMSNormalization" in fails_with(proto, tmp_path)


@pytest.mark.parametrize("end", ["past_key_values.0.value", "present.0.value"])
def test_cache_update_that_is_not_at_the_ends_stops_the_build(end, tmp_path):
    proto = build_graphs.decoder()
    for node in proto.graph.node:
        node.input[:] = ["between" if name == end else name for name in node.input]
        node.output[:] = ["between" if name == end else name for name in node.output]
    ends = (end, "between") if end.startswith("past") else ("between", end)
    proto.graph.node.append(helper.make_node("Identity", [ends[0]], [ends[1]], name="copy"))
    with pytest.raises(UserError, match=r"cache update present.0.value: (reads|writes) no .* directly"):
        build(job(proto, tmp_path))


def test_cache_that_is_copied_is_a_warning(tmp_path):
    proto = build_graphs.decoder()
    update = next(node for node in proto.graph.node if node.output[0] == "present.0.value")
    past, new, _ = update.input
    update.CopyFrom(helper.make_node("Add", [past, new], ["present.0.value"]))
    (finding,) = build(job(proto, tmp_path))["findings"]
    assert (finding.severity, finding.where) == ("warning", f"cache {past}")


def test_parser_that_dies_is_one_line(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4, 8, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    line = fails_with(build_graphs.model([helper.make_node("Attention", ["x", "x", "x"], ["y"])], [x], [y]), tmp_path)
    assert "SIGSEGV" in line
    assert "model.trt.onnx" in line


def test_parse_error_is_one_line(tmp_path):
    proto = build_graphs.decoder()
    for node in [node for node in proto.graph.node if node.op_type == "Gemm"][:2]:
        node.op_type, node.domain = "Gimm", ""
    line = fails_with(proto, tmp_path)
    assert "Gimm Gemm_" in line
    assert "(and 1 more)" in line


def test_build_error_is_one_line(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 4, 8, 8]) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    assert "not supported by a dedicated kernel" in fails_with(build_graphs.model([node], values[:3], values[3:]), tmp_path)


def test_dynamic_input_of_no_decoder(tmp_path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3]) for name in "xy")
    assert "dynamic inputs (x)" in fails_with(build_graphs.model([helper.make_node("Relu", ["x"], ["y"])], [x], [y]), tmp_path)


def test_dynamic_dimension_that_no_decoder_has(tmp_path):
    proto = build_graphs.decoder()
    proto.graph.input.append(helper.make_tensor_value_info("adapter", TensorProto.FLOAT16, ["rank", 3]))
    with pytest.raises(UserError, match=r"input adapter: its dimension 0 \(rank\) is dynamic"):
        make_profiles(proto, find_signature(proto), split=True, batch=2, prompt=None, past=64)


def test_capability_that_the_flavour_cannot_build_for():
    with pytest.raises(UserError, match=r"9\.0: TensorRT-RTX does not build for it; choose among .*8\.9"):
        flavour.capabilities("rtx", ["8.9", "9.0"])


def test_prompt_longer_than_the_cache():
    proto = build_graphs.decoder()
    with pytest.raises(UserError, match="the cache has 64 slots"):
        make_profiles(proto, find_signature(proto), split=True, batch=1, prompt=65, past=64)


def test_no_space_left(tmp_path):
    proto = build_graphs.decoder()
    with pytest.raises(OSError, match="No space left"):
        build(replace(job(proto, tmp_path), engine=Path("/dev/full")))


def test_interrupted_build_leaves_nothing(tmp_path):
    model = saved(build_graphs.decoder(layers=48), tmp_path)
    command = [sys.executable, "-m", "build", str(model), "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    while "building" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors == "build: interrupted; run the same command again to carry on\n"
    assert not list((tmp_path / "out").glob("**/*"))


def test_profiles_of_a_growing_cache():
    def value(name, dtype, *shape):
        return helper.make_tensor_value_info(name, dtype, list(shape))

    tokens = [value(name, TensorProto.INT64, "b", "s") for name in ("input_ids", "position_ids")]
    past, present = (value(f"{name}.0.key", TensorProto.FLOAT, "b", 2, "p", 8) for name in ("past_key_values", "present"))
    inputs = [*tokens, value("attention_mask", TensorProto.INT64, "b", "p + s"), past]
    logits = value("logits", TensorProto.FLOAT, "b", "s", 7)
    proto = build_graphs.model([helper.make_node("Relu", ["x"], ["y"])], inputs, [logits, present])
    one, *more = make_profiles(proto, find_signature(proto), split=False, batch=3, prompt=16, past=100)
    assert (one.name, more) == ("any", [])
    assert one.shapes["input_ids"] == ((1, 1), (1, 1), (3, 16))
    assert one.shapes["attention_mask"] == ((1, 1), (1, 51), (3, 116))
    assert one.shapes["past_key_values.0.key"] == ((1, 2, 0, 8), (1, 2, 50, 8), (3, 2, 100, 8))
    decode, prompt = make_profiles(proto, find_signature(proto), split=True, batch=3, prompt=16, past=100)
    assert decode.shapes["input_ids"][2] == (3, 1)
    assert prompt.shapes["attention_mask"] == ((1, 1), (1, 16), (3, 116))


def test_host_work_is_no_kernel():
    tensor = "{{ Name: {}, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Int64, Format: (Linear) x }}"
    lines = [
        "Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Outputs: [], TacticName: , StreamId: 0",
        f"Name: cast_myl0_1, LayerType: cast, Inputs: [], Outputs: [ {tensor.format('hvar^1i64_myl0')}], StreamId: 0",
        f"Name: cast_myl0_2, LayerType: cast, Inputs: [], Outputs: [ {tensor.format('real')}], StreamId: 0",
        f"Name: x [profile 1]_myl1_0, LayerType: brand_new, Inputs: [], Outputs: [ {tensor.format('x')}], StreamId: 0",
    ]
    first, second = read_kernels(["Layers:\n" + "\n".join(lines)], ["decode", "prompt"])
    assert [entry["kernel"] for entry in first["entries"]] == [False, False, True]
    assert first["entries"][2]["outputs"] == [{"name": "real", "shape": [1], "dtype": "int64"}]
    assert (second["kernels"], second["by_type"]) == (1, {"brand_new": 1})


def test_fraction_counts_phases_within_phases():
    fraction = Fraction()
    fraction.start("all", None, 2)
    fraction.start("part", "all", 4)
    assert fraction.step("part", 0) == pytest.approx(1 / 8)
    assert fraction.step("part", 3) == pytest.approx(1 / 2)
    fraction.finish("part")
    assert fraction.step("all", 0) == pytest.approx(1 / 2)
    fraction.start("part", "all", 2)
    assert fraction.step("part", 0) == pytest.approx(3 / 4)
    assert fraction.step("unknown", 0) == pytest.approx(3 / 4)


def kernel(name: str, inputs=(), constants=(), outputs=(), nodes=()) -> dict:
    tensors = [
        [{"name": n, "shape": list(shape), "dtype": "half"} for n, shape in each] for each in (inputs, constants, outputs)
    ]
    return {"name": name, "type": "kgen", "kernel": True, "onnx_nodes": list(nodes),
            **dict(zip(("inputs", "constants", "outputs"), tensors))}  # fmt: skip


def cost(*kernels: dict, bound=frozenset()) -> tuple[dict, list]:
    proto = build_graphs.decoder()
    profile = {"profile": "decode", "entries": list(kernels)}
    return profile, add_cost(profile, describe_graph(proto, find_signature(proto), frozenset(bound)))


CACHE = [-1, 4, 64, 32]


def test_bytes_of_kernels():
    written = kernel("_scatter_myl0_1", [("present.0.key", CACHE), ("k", [-1, 128])], [], [("present.0.key", CACHE)])
    rows = kernel("__myl_CastGathMul_myl0_2", [("input_ids", [-1, 1])], [("embed", [512, 128])], [("x", [-1, 128])])
    halves = kernel("__myl_SiluMul_myl0_3", [("y", [-1, 256])] * 3, [], [("z", [-1, 256])])
    made = kernel("gemm_myl0_2", [("x", [-1, 128])], [("w", [128, 512])], [("y", [-1, 512])], ["layers.1/mlp.w1"])
    profile, findings = cost(rows, made, halves, written)
    assert [entry["bytes"] for entry in profile["entries"]] == [
        {"weights": 256, "cache": 0, "other": 2 + 256},  # one row of the table
        {"weights": 2 * 128 * 512, "cache": 0, "other": 256 + 1024},
        {"weights": 0, "cache": 0, "other": 1024 + 512},  # parts of y, together no more than all of it
        {"weights": 0, "cache": 2 * 4 * 32, "other": 256},  # one slot
    ]
    assert (findings, kernels_a_layer(profile), profile["kernels_outside_layers"]) == ([], "3", 1)
    assert over_floor(profile) == sum(profile["decode_bytes"].values()) / profile["floor_bytes"]


@pytest.mark.parametrize(
    ("name", "tensor", "where", "way_out"),
    [
        ("past_key_values.0.key", CACHE, "inputs", "lower the graph"),
        ("0.down.weight", [128, 256], "inputs", "take --weights constant"),
        ("dconst", [128, 256], "constants", "take --weights constant"),
    ],
)
def test_copies_of_weights_and_caches_are_findings(name, tensor, where, way_out):
    moved = kernel("__myl_TranMove_myl0_1", **{where: [(name, tensor)]}, outputs=[("elsewhere", tensor[::-1])])
    profile, (finding,) = cost(moved, bound={"0.down.weight"})
    assert (finding.severity, way_out in finding.way_out) == ("warning", True)
    assert f"of {name}" in finding.what
    assert profile["copied_bytes"] == 2 * 2 * abs(int(np.prod(tensor)))


def test_a_copy_whose_heads_are_joined_with_the_batch_keeps_its_size():
    moved = kernel("__myl_ReshTran_myl0_1", [("present.0.key", CACHE)], [], [("elsewhere", [-1, 32, 64])])
    used = kernel("_gemm_mha_myl0_2", [("elsewhere", [-1, 32, 64])], [], [("y", [-1, -1, 32])])
    profile, (finding,) = cost(moved, used)
    assert profile["entries"][1]["bytes"]["other"] == 2 * (4 * 64 * 32 + 32)
    assert "1 kernels copy caches" in finding.what


def test_unknown_dtype_leaves_the_bytes_unknown():
    entry = kernel("gemm_myl0_1", [("x", [-1, 128])])
    entry["inputs"][0]["dtype"] = "posit16"
    profile, findings = cost(entry)
    assert (profile["decode_bytes"], over_floor(profile), findings) == (None, None, [])


def test_a_growing_cache_leaves_the_bytes_unknown():
    proto = build_graphs.decoder()
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[2].dim_param = "past"
    profile = {"profile": "any", "entries": [kernel("gemm_myl0_1", [("x", [-1, 128])])]}
    assert add_cost(profile, describe_graph(proto, find_signature(proto))) == []
    assert (profile["decode_bytes"], profile["floor_bytes"]) == (None, None)


def memory(proto: onnx.ModelProto, **options):
    signature = find_signature(proto)
    return estimate(proto, signature, make_profiles(proto, signature, split=True, batch=4, prompt=64, past=64), **options)


def test_memory_of_qwen_7b_as_measured():
    """15.44 GB of weights, products merged: 18.3 GB of anonymous memory; as inputs: 0.6 GB. Apart: more than 20 GB."""
    proto = build_graphs.decoder(layers=32)
    merged = [node for node in proto.graph.node if node.op_type == "Gemm"]
    for index, node in enumerate(merged):
        node.input[0] = f"apart_{index}"
    assert memory(proto, constant=15_440_000_000, bound=0).builder_peak == pytest.approx(18.3e9, rel=0.03)
    assert memory(proto, constant=107_410, bound=15_440_000_000).builder_peak == pytest.approx(0.6e9, rel=0.03)
    for node, input_ in zip(
        merged, [node.input[0] for node in build_graphs.decoder(layers=32).graph.node if node.op_type == "Gemm"]
    ):
        node.input[0] = input_
    siblings = 32 * 2 * (3 * 128 * 128 + 2 * 128 * 256)
    apart = memory(proto, constant=15_440_000_000, bound=0)
    assert apart.builder_peak - 1.15 * 15_440_000_000 - siblings == pytest.approx(606e6, rel=0.01)


def test_memory_at_run_time():
    needed = memory(build_graphs.decoder(layers=2), constant=1_000_000, bound=500)
    assert needed.caches == 4 * 2 * 2 * 4 * 64 * 32 * 2
    assert needed.logits == 4 * 64 * 512 * 2
    assert needed.weights == 1_000_500
    # a layer's products, the mask, one layer's caches
    assert needed.activations == 256 * 2 * (5 * 128 + 2 * 256 + 64) + needed.caches // 2
    assert needed.gpu == needed.caches + needed.logits + needed.weights + needed.activations


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    needed = memory(build_graphs.decoder(), constant=15_440_000_000, bound=0)
    monkeypatch.setattr("build.memory.available_memory", lambda: 24_000_000_000)
    monkeypatch.setattr("build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=16_000_000_000))
    refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("build.memory.shutil.disk_usage", lambda folder: argparse.Namespace(free=9_000_000_000))
    with pytest.raises(UserError, match=r"the engine needs about 15.4 GB, and 9.0 GB are free"):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path / "not" / "yet", needed, as_inputs=False)
    monkeypatch.setattr("build.memory.available_memory", lambda: 17_000_000_000)
    with pytest.raises(
        UserError, match=r"needs about 18.1 GB of memory, and 17.0 GB are free; free memory, or take --weights input"
    ):
        refuse_what_cannot_fit(tmp_path / "m.onnx", tmp_path, needed, as_inputs=False)


def test_a_build_that_cannot_fit_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("build.memory.TENSORRT", 10**15)
    monkeypatch.setattr(sys, "argv", ["build", str(saved(build_graphs.decoder(), tmp_path)), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="building its engine needs about 1000000"):
        build_main.main(build_main._arguments())
    assert not (tmp_path / "out").exists()


def test_weights_that_an_engine_holds_twice():
    assert build_main.held_twice(3_302_000_000, 3_299_000_000, two=True) == []
    (finding,) = build_main.held_twice(6_000_000_000, 3_299_000_000, two=True)
    assert "2,701.0 MB more than its weights" in finding.what
    assert build_main.held_twice(6_000_000_000, 3_299_000_000, two=False) == []


def test_a_type_that_a_gpu_lacks(tmp_path, capsys):
    model = onnx.parser.parse_model("""<ir_version: 11, opset_import: ["": 24]>
        g (float16[4,1] x) => (float16[4,2] y) <float8e4m3fn[1,2] w = {56, 64}, float16 s = {14336}>
        { d = DequantizeLinear(w, s) y = MatMul(x, d) }""")
    assert supported(model, "m", ("8.6", "8.9", "12.0"), asked=False) == ("8.9", "12.0")
    assert "not for 8.6, which has no fp8" in capsys.readouterr().out
    for capabilities, asked in ((("8.6", "8.9"), True), (("8.0",), False)):
        with pytest.raises(UserError, match=r"is quantised to fp8, which compute capability 8\.[06] does not have; name 8\.9"):
            supported(model, "m", capabilities, asked)
    assert supported(model, "m", ("8.9", "9.0"), asked=True) == ("8.9", "9.0")

"""build/: real engines of small decoders, built with TensorRT-RTX on the CPU."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from suture.build import flavour
from suture.build.kernels import read_kernels
from suture.build.precisions import supported
from suture.build.process import build
from suture.build.profiles import make_profiles
from suture.build.progress import Fraction
from suture.build.worker import Job
from suture.core.errors import UserError
from suture.core.signature import find_signature

ROOT = Path(__file__).parents[1]


def run_build(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "suture.build", str(model), "--out", str(out), "--compute-capability", "8.9", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "model.trt.onnx")
    return folder / "model.trt.onnx"


def job(proto: onnx.ModelProto, folder: Path, past: str | None = None) -> Job:
    """A build of `proto` that skips the audit of the graph, so that only the network's is at work."""
    signature = find_signature(proto, past_pattern=past)
    profiles = make_profiles(proto, signature, split=True, batch=2, prompt=16, past=64)
    model = saved(proto, folder)
    return Job(
        model, folder, folder / "model.engine", "rtx", ("8.9",), signature, profiles, frozenset(), folder / "timings.cache"
    )


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
    said = {"float32": ["attention in FLOAT is decomposed"], "bfloat16": []}
    assert [finding.what for finding in result["findings"]] == said[dtype]
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


def test_profiles_of_a_growing_cache():
    def value(name, dtype, *shape):
        return helper.make_tensor_value_info(name, dtype, list(shape))

    tokens = [value(name, TensorProto.INT64, "b", "s") for name in ("input_ids", "position_ids")]
    past, present = (value(f"{name}.0.key", TensorProto.FLOAT, "b", 2, "p", 8) for name in ("past_key_values", "present"))
    inputs = [*tokens, value("attention_mask", TensorProto.INT64, "b", "p + s"), past]
    logits = value("logits", TensorProto.FLOAT, "b", "s", 7)
    proto = build_graphs.model([helper.make_node("Relu", ["x"], ["y"])], inputs, [logits, present])
    one, *more = make_profiles(proto, find_signature(proto, past_pattern="past"), split=False, batch=3, prompt=16, past=100)
    assert (one.name, more) == ("any", [])
    assert one.shapes["input_ids"] == ((1, 1), (1, 1), (3, 16))
    assert one.shapes["attention_mask"] == ((1, 1), (1, 51), (3, 116))
    assert one.shapes["past_key_values.0.key"] == ((1, 2, 0, 8), (1, 2, 50, 8), (3, 2, 100, 8))
    decode, prompt = make_profiles(proto, find_signature(proto, past_pattern="past"), split=True, batch=3, prompt=16, past=100)
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


def test_timings_are_kept_between_builds(tmp_path):
    """Standard TensorRT's calls, which TensorRT-RTX has too but lets do nothing."""
    trt = flavour.load("rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    file = tmp_path / "timings.cache"
    for _ in range(2):  # without earlier ones, and with
        config = builder.create_builder_config()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            flavour.read_timings("standard", config, file)
            flavour.write_timings("standard", config, file)
        assert file.stat().st_size > 0
    flavour.write_timings("rtx", config, tmp_path / "none.cache")
    assert not (tmp_path / "none.cache").exists()

"""Engines of quantised graphs: their kernels read the small weights themselves, and multiply in the small type."""

import json
from pathlib import Path

import pytest
from exporting import first_layer

from suture.build import __main__ as build_main
from suture.build.precisions import supported
from suture.core.errors import UserError
from suture.core.weights import load_graph
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.surgery.__main__ import main
from tests.stored_traces import tracing_stored

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9")
PRODUCTS = 4  # of one layer; gate and up are one kernel


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """tiny-qwen's first layer, in float16."""
    folder = first_layer(tmp_path_factory.mktemp("one-layer"))
    out = folder / "export"
    with tracing_stored("first-layer", "float16"):
        export(out, ExportOptions(checkpoint=folder, dtype="float16"))
    return out / "model.onnx"


@pytest.mark.parametrize(
    ("options", "weights", "activations", "capable"),
    [
        (("--quantize", "int4"), "int4", "half", ("8.0", "8.6", "8.9")),
        (("--quantize", "int4-awq"), "int4", "half", ("8.0", "8.6", "8.9")),
        (("--quantize", "int8-smoothquant"), "int8", "int8", CAPABILITIES),
        (("--quantize", "fp8", "--kv-cache", "fp8", "--cache", "growing"), "fp8", "fp8", ("8.9",)),
        (("--quantize", "int8", "--kv-cache", "int8", "--cache", "growing"), "int8", "half", CAPABILITIES),
    ],
)
@pytest.mark.sample("*options0*", "*options3*")
def test_kernels_read_small_weights(exported, tmp_path, monkeypatch, options, weights, activations, capable):
    static = [] if "growing" in options else ["--capacity", "64"]
    assert main([str(exported), "--out", str(tmp_path / "surgery"), *static, *options]) == 0
    lowered, out = tmp_path / "surgery" / "model.trt.onnx", tmp_path / "build"
    assert supported(load_graph(lowered), lowered, CAPABILITIES, asked=False) == capable
    for lacking in set(CAPABILITIES) - set(capable):
        with pytest.raises(UserError, match=f"is quantised to {weights}, which compute capability {lacking} does not have"):
            supported(load_graph(lowered), lowered, (lacking,), asked=True)
    line = f"build {lowered} --out {out} --compute-capability 8.9 --profiles one" + " --max-past 64" * ("growing" in options)
    monkeypatch.setattr("sys.argv", line.split())
    build_main.main()
    (profile,) = json.loads((tmp_path / "build" / "kernels.json").read_text())["profiles"]
    products = [
        entry
        for entry in profile["entries"]
        if any(each["dtype"] == weights and len(each["shape"]) == 2 and min(each["shape"]) > 1 for each in entry["constants"])
        and entry["layer"] == 0
    ]
    assert len(products) == PRODUCTS, [entry["name"] for entry in profile["entries"]]
    for product in products:
        assert activations in {each["dtype"] for each in product["inputs"]}
    if "--kv-cache" in options:
        engine = json.loads((tmp_path / "build" / "engine.json").read_text())
        caches = [each for each in engine["inputs"] if each["role"] == "cache"]
        assert {each["dtype"] for each in caches} == {{"fp8": "float8_e4m3fn"}.get(options[3], options[3])}


@pytest.fixture(scope="module")
def exported_bfloat16(exported) -> Path:
    out = exported.parents[1] / "bfloat16"
    export(out, ExportOptions(checkpoint=exported.parents[1], dtype="bfloat16"))
    return out / "model.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [[], ["--skip", "neighbouring_weights"]])
def test_int8_weights_stay_small_in_bfloat16(exported_bfloat16, tmp_path, monkeypatch, skipped):
    """Gate and up that are apart TensorRT writes out in bfloat16 at every step, to join them; in float16 it does not."""
    arguments = [str(exported_bfloat16), "--out", str(tmp_path / "surgery"), "--capacity", "64", "--verify"]
    assert main([*arguments, "--quantize", "int8", *skipped]) == 0
    out = tmp_path / "build"
    line = f"build {tmp_path / 'surgery' / 'model.trt.onnx'} --out {out} --compute-capability 8.9"
    monkeypatch.setattr("sys.argv", line.split())
    build_main.main()
    decode, _ = json.loads((out / "kernels.json").read_text())["profiles"]
    written_out = [entry["name"] for entry in decode["entries"] if entry["kernel"] and not entry["inputs"]]
    said = [
        each["what"] for each in json.loads((out / "engine.json").read_text())["findings"] if "copy weights" in each["what"]
    ]
    assert (len(written_out), len(said)) == ((1, 2) if skipped else (0, 0))

"""validate --bundle and --import: what is sent to a GPU, its run on a stand-in for the engine, and what comes back."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import build_graphs
import numpy as np
import onnx
import pytest
import torch
from fake_engine import Context, FakeEngine

from suture.build import flavour
from suture.core.errors import UserError
from suture.runtime.graphs import open_graph
from suture.validate.bundle import read_results, write_bundle
from suture.validate.compare import DIFFERENT, PASSED, compare
from suture.validate.options import ValidateOptions
from suture.validate.scenarios import make_scenarios, random_tokens
from suture.validate.stage import bundle_pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline's folder, its engine a stand-in of a few bytes and its bundle written."""
    folder = tmp_path_factory.mktemp("pipeline")
    for stage in ("export", "surgery", "build"):
        (folder / stage).mkdir()
    portable = build_graphs.portable_decoder()
    onnx.save(portable, folder / "surgery" / "model.onnx")
    onnx.save(portable, folder / "export" / "model.onnx")
    build_graphs.by_reference(build_graphs.decoder("float32"), folder / "lowered", folder / "checkpoint")
    (folder / "lowered" / "model.trt.onnx").rename(folder / "surgery" / "model.trt.onnx")
    manifest = json.loads((folder / "lowered" / "manifest.json").read_text())
    manifest["outputs"]["model.onnx"] = 0
    manifest |= {"options": {}, "seconds": 0.0, "peak_memory_bytes": 0}
    (folder / "surgery" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "build" / "engine.json").write_text(json.dumps(build_graphs.describe(portable)))
    (folder / "build" / "model.engine").write_bytes(b"engine")
    paths = folder / "surgery" / "model.onnx", folder / "surgery" / "model.trt.onnx", folder / "build" / "model.engine"
    write_bundle(
        *paths, folder / "bundle", lambda graph: make_scenarios(random_tokens(graph.vocab, 0), graph.capacity, None), None
    )
    return folder


@pytest.fixture
def run_py(pipeline, monkeypatch):
    """The bundle's run.py as a module, its engine.py beside it, on a stand-in for the engine."""
    monkeypatch.syspath_prepend(str(pipeline / "bundle"))
    module = importlib.import_module("run")
    portable = onnx.load(pipeline / "surgery" / "model.onnx")
    monkeypatch.setattr(module, "why_not", lambda description: None)
    monkeypatch.setattr(module, "Engine", lambda path, description, root: sys.modules["engine"].Engine(
        path, description, root, FakeEngine(portable), device="cpu"))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    yield module
    for name in ("run", "engine"):
        del sys.modules[name]


def results_of(pipeline: Path):
    surgery = pipeline / "surgery"
    return read_results(pipeline / "bundle" / "results.npz", surgery / "model.onnx", surgery / "model.trt.onnx")


def test_bundle_stands_alone(pipeline):
    bundle = pipeline / "bundle"
    assert {path.name for path in bundle.iterdir()} == {
        "run.py", "engine.py", "engine.json", "model.engine", "weights", "steps.npz", "bundle.json", "manifest.json",
    }  # fmt: skip
    assert {path.name for path in (bundle / "weights").iterdir()} == {"model.trt.onnx", "model.safetensors"}
    done = subprocess.run([sys.executable, "run.py"], cwd=bundle, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no GPU that torch can use" in done.stdout


@pytest.mark.slow
def test_results_become_level_4(pipeline, run_py, capsys):
    assert run_py.main() == 0
    assert "passed on a stand-in with tensorrt_rtx" in capsys.readouterr().out
    results = results_of(pipeline)
    comparison = compare(open_graph(pipeline / "surgery" / "model.onnx"), results, results.scenarios)
    assert comparison.status == PASSED, comparison.scenarios
    assert [scenario.name for scenario in comparison.scenarios][-1] == "to the last slot"
    assert {output.output for output in comparison.scenarios[0].outputs} == {"logits", "present.0.key", "present.0.value"}
    assert results.notes[0].startswith("Ran on a stand-in with tensorrt_rtx")
    command = [sys.executable, "-m", "suture.validate", pipeline, "--import", pipeline / "bundle" / "results.npz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    levels = json.loads((pipeline / "validate" / "report.json").read_text())["levels"]
    assert levels[3]["status"] == PASSED
    assert levels[3]["notes"] == results.notes


@pytest.mark.parametrize("what", ["2/5/logits", "2/past_key_values.0.value"])
@pytest.mark.seconds
def test_a_wrong_value_is_different(what, pipeline, run_py):
    run_py.main()
    path = pipeline / "bundle" / "results.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays[what][0, 0, 0] += 1.0
    np.savez(path, **arrays)
    results = results_of(pipeline)
    comparison = compare(open_graph(pipeline / "surgery" / "model.onnx"), results, results.scenarios)
    assert [scenario.status == DIFFERENT for scenario in comparison.scenarios] == [False, False, True, False, False, False]


def test_run_py_finds_a_difference_itself(run_py, monkeypatch):
    """One layer's new keys go elsewhere than into the cache."""
    elsewhere = np.zeros(1 << 20)
    bind = Context.set_tensor_address

    def misbound(context, name, address):
        bind(context, name, elsewhere.ctypes.data if name == "present.0.key" else address)

    monkeypatch.setattr(Context, "set_tensor_address", misbound)
    assert run_py.main() == 1


def test_not_a_number_is_no_small_error(run_py):
    assert run_py.worst_error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == float("inf")
    assert run_py.worst_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25


def test_an_engine_is_built_there(pipeline, run_py, monkeypatch):
    """With TensorRT-RTX in the place of standard TensorRT, given the GPU."""
    trt = flavour.load("rtx")

    class Builder(trt.Builder):
        def create_builder_config(self):
            config = super().create_builder_config()
            flavour.set_capabilities("rtx", config, ("8.9",))
            return config

    class Standard:
        __version__ = "11.0"
        __getattr__ = staticmethod(lambda name: Builder if name == "Builder" else getattr(trt, name))

    monkeypatch.setitem(sys.modules, "tensorrt", Standard())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    path, description = run_py.build_here(json.loads((pipeline / "bundle" / "engine.json").read_text()))
    assert path.stat().st_size > 1_000_000
    assert description["compute_capabilities"] == ["9.0"]
    assert description["tensorrt"] == {"flavour": "standard", "version": "11.0"}


def test_results_of_other_graphs(pipeline, run_py, tmp_path):
    run_py.main()
    other = tmp_path / "model.onnx"
    graph = build_graphs.portable_decoder()
    graph.graph.name = "another"
    onnx.save(graph, other)
    results = pipeline / "bundle" / "results.npz"
    with pytest.raises(UserError, match="comes from other graphs than this folder's"):
        read_results(results, other, pipeline / "surgery" / "model.trt.onnx")
    (tmp_path / "nonsense.npz").write_bytes(b"nonsense")
    for path, wrong in ((tmp_path / "nonsense.npz", "is not a result of a bundle"), (tmp_path / "absent.npz", "no such file")):
        with pytest.raises(UserError, match=wrong):
            read_results(path, other, other)


def test_bundle_of_a_folder_without_an_engine(pipeline, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_bytes((pipeline / "export" / "model.onnx").read_bytes())
    with pytest.raises(UserError, match=f"{tmp_path}/surgery: has no results; run python -m surgery first"):
        bundle_pipeline(tmp_path, ValidateOptions())


def test_scenarios_that_the_engine_cannot_take_are_left_out(pipeline, tmp_path):
    description = json.loads((pipeline / "build" / "engine.json").read_text())
    for profile in description["profiles"]:
        for name, (smallest, best, largest) in profile["shapes"].items():
            profile["shapes"][name] = [smallest, best, [1, *largest[1:]]]
    (tmp_path / "engine.json").write_text(json.dumps(description))
    (tmp_path / "model.engine").write_bytes(b"engine")
    paths = pipeline / "surgery" / "model.onnx", pipeline / "surgery" / "model.trt.onnx", tmp_path / "model.engine"
    bundle = write_bundle(
        *paths, tmp_path / "out", lambda graph: make_scenarios(random_tokens(graph.vocab, 0), None, None), None
    )
    assert bundle["left_out"] == [
        f"{name}, whose steps no profile of the engine allows" for name in ("ragged batch", "mixed batch")
    ]
    assert [scenario["name"] for scenario in bundle["scenarios"]] == ["prompt", "chunked prompt", "decode"]

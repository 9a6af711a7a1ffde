"""The public API, as docs/api.md shows it, and what importing and asking for help costs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import numpy_helper

import suture
from suture.__main__ import COMMANDS
from suture.surgery.graph import need
from suture.surgery.options import SurgeryOptions
from suture.surgery.plan import make_plan
from suture.surgery.verification.verify import ChangedOutput
from suture.testing import check_pass

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnx_ir", "numpy", "matplotlib", "polygraphy",
         "tensorrt", "tensorrt_rtx"}  # fmt: skip

WRONG = '''"""rms(x) → -x."""


def run(graph):
    return graph.match(negate, graph.nodes("RMSNormalization"))


def negate(graph, node):
    graph.replace(node.outputs[0], "Neg", [node.inputs[0]])
    return True
'''


@pytest.fixture
def clipped() -> onnx.ModelProto:
    """Clips with no bounds, with bounds, and with one that is computed."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N, 2] x, float most) => (float[N, 2] y) '
        "{ a = Clip(x, low, high) b = Clip(a, low, one) y = Clip(b, low, most) }"
    )
    bounds = {"low": -np.inf, "high": np.inf, "one": 0.5}
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in bounds.items())
    return model


# --- the documentation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_documented_examples_run(tiny_export, tmp_path, monkeypatch, capsys):
    for path in tiny_export.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    shutil.copytree(ROOT / "models" / "tiny-qwen", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    graph, checkpoint, own_pass = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    exec(graph, found := {})
    assert found["operated"].report.nodes["portable"] < found["operated"].report.nodes["before"] / 2
    assert found["compared"].status == "passed"
    assert found["checked"].verdict == "agrees"
    assert len(found["checked"].outcomes) == 3
    assert (tmp_path / "portable.onnx").is_file()
    exec(checkpoint, found := {})
    assert found["logits"].shape == (1, found["tokens"].shape[1], found["model"].opened.model.vocab)
    assert found["engine"].is_file()
    capsys.readouterr()
    exec(own_pass, {})
    assert capsys.readouterr().out == "0\n"  # tiny-qwen has no Clip


def test_the_documented_pass_is_the_example():
    code, test = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_pass.md").read_text(), re.DOTALL)
    assert code == (ROOT / "examples" / "own_pass.py").read_text()
    assert test == (ROOT / "examples" / "test_own_pass.py").read_text()


# --- operate -------------------------------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_operate_leaves_its_model_and_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = decoder_graph(static=False)
    before = model.SerializeToString()
    operated = suture.operate(model, capacity=32, merge=("qkv",), onnxruntime=True)
    assert model.SerializeToString() == before
    assert not list(tmp_path.iterdir())
    assert operated.report.ops["portable"]["TensorScatter"] == 4
    assert any(node.domain == "com.microsoft" for node in operated.onnxruntime.graph.node)
    assert suture.compare(model, operated.portable).status == "passed"


@pytest.mark.seconds
def test_operate_on_a_file_is_what_the_stage_writes(tmp_path):
    from suture.surgery.__main__ import main

    onnx.save(decoder_graph(static=False), tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), "--capacity", "32", "--out", str(tmp_path / "out")]) == 0
    operated = suture.operate(tmp_path / "model.onnx", capacity=32)
    for name, made in (("model.onnx", operated.portable), ("model.trt.onnx", operated.lowered)):
        assert onnx.load(tmp_path / "out" / name) == made


def test_operate_refuses_what_it_cannot_do():
    model = decoder_graph(static=False)
    with pytest.raises(suture.UserError, match="no such pass"):
        suture.operate(model, skip=("nothing",))
    with pytest.raises(TypeError, match="capactiy"):
        suture.operate(model, capactiy=32)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="nowhere.bin")
    with pytest.raises(suture.UserError, match=r"nowhere\.bin"):
        suture.operate(model)


@pytest.mark.parametrize("bisect", [False, True])
@pytest.mark.seconds
def test_operate_raises_a_difference(bisect, tmp_path):
    (tmp_path / "negated.py").write_text(WRONG)
    with pytest.raises(ChangedOutput, match=r"^negated.*changes") as found:
        suture.operate(decoder_graph(static=False), own=(str(tmp_path / "negated.py"),), verify=True, bisect=bisect)
    assert ("match 1 of" in str(found.value)) == bisect


def test_a_pass_that_imports_the_old_name_is_told_the_new_one(tmp_path):
    path = tmp_path / "old.py"
    path.write_text('"""x → x."""\n\nfrom surgery.graph import need\n\n\ndef run(graph):\n    return 0\n')
    with pytest.raises(suture.UserError, match=r"imports surgery\.graph, .*; import suture\.surgery\.graph$"):
        make_plan(SurgeryOptions(own=(str(path),)))


# --- check_pass ----------------------------------------------------------------------------------------------------------


def test_check_pass_runs_the_example(clipped, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import own_pass

    assert check_pass(own_pass.run, clipped) == 1


def test_check_pass_names_the_tensor_that_differs(clipped):
    def drop(graph, node):
        need(node.outputs[0].name == "b", "another one")
        graph.redirect(node.outputs[0], node.inputs[0])
        return True

    with pytest.raises(AssertionError, match=r"first at the Clip .*|changes y"):
        check_pass(lambda graph: graph.match(drop, graph.nodes("Clip")), clipped)


def test_check_pass_wants_a_number(clipped):
    with pytest.raises(AssertionError, match="returned None"):
        check_pass(lambda graph: None, clipped)


# --- what importing and asking for help costs -----------------------------------------------------------------------------


def python(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from suture.__main__ import main
sys.argv = ["suture", {command!r}, "--help"]
try:
    main()
except SystemExit as ended:
    print("\\n", ended.code, sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))
"""
    done = python(code)
    assert done.stdout.startswith(f"usage: suture {command} "), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "0 []"


@pytest.mark.parametrize("module", ["surgery.capacity", "surgery.ranks", "models.random_checkpoint", "models.convert"])
def test_help_of_a_command_that_is_a_module_imports_nothing_heavy_and_itself_once(module):
    code = f"""
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module("suture.{module}", run_name="__main__")
except SystemExit as ended:
    print("\\n", ended.code, sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))
"""
    done = python(code)
    assert done.stdout.splitlines()[-1].strip() == "0 []"
    assert done.stderr == ""  # runpy's warning where the package's __init__ imports the module


def test_importing_changes_no_environment_and_patches_nothing():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name: ROOT / (name.removeprefix("suture.").replace(".", "/") if "." in name else name) for name in packages}
    alone = "suture.validate.bundle_run"  # copied to GPU hosts beside runtime/engine.py, which it imports as engine
    modules = [
        f"{name}.{path.stem}" if path.stem != "__init__" else name
        for name, folder in folders.items() for path in sorted(folder.glob("*.py")) if path.stem != "__main__"
    ]  # fmt: skip
    modules.remove(alone)
    code = """
import importlib, json, os, sys
import onnx, onnxruntime, matplotlib.pyplot, polygraphy.comparator, onnx_ir, transformers.models.gpt2.modeling_gpt2
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.misc import SynchronizedList
def state():
    return dict(os.environ), G_LOGGER.severity, SynchronizedList._remove_from_elem, type(sys.stdout)
before, modules = state(), json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
    assert state() == before, name
print(len(modules))
"""
    done = python(code, json.dumps(modules))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150


@pytest.mark.parametrize(
    ("line", "broken"),
    [(["surgery", "m.onnx"], "onnx"), (["build", "m.onnx"], "onnx"), (["export", "--model", "tiny-qwen"], "torch"),
     (["validate", "a.onnx", "b.onnx"], "onnx"), (["generate", "o", "--prompts", "p.txt"], "torch")],
)  # fmt: skip
def test_an_import_that_fails_is_a_fault(line, broken, tmp_path):
    """By itself Python ends with 1, which is a check's that found a difference."""
    (tmp_path / f"{broken}.py").write_text("1 / 0\n")
    (tmp_path / "p.txt").write_text("a prompt\n")
    command = [sys.executable, "-m", f"suture.{line[0]}", *line[1:], "--out", str(tmp_path / "out")]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.count("\n") == 1

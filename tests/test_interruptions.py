"""A stage killed where it hurts most, between moving one result to its place and the next: the next run puts it right."""

import os
import signal
import subprocess
from importlib import import_module
from pathlib import Path

import build_graphs
import onnx
import pytest
from decoder_graphs import decoder_graph
from processes import children, running_still, started, wait_for

from suture.core.manifest import PARTIAL, read_manifest
from suture.surgery.__main__ import main as surgery

DIES = """
import os, runpy, signal, sys
replace, moved = os.replace, []

def replace_once(source, target):
    if moved:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(target)
    replace(source, target)

os.replace = replace_once
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def model(tmp_path) -> Path:
    return build_graphs.by_reference(build_graphs.decoder(), tmp_path / "surgery", tmp_path / "checkpoint")


def arguments(stage: str, model: Path, folder: Path) -> list[object]:
    if stage == "build":
        return [model, "--compute-capability", "8.9"]
    for static in (False, True):
        onnx.save(decoder_graph(static), folder / f"{static}.onnx")
    return [folder / "False.onnx"] if stage == "surgery" else [folder / "False.onnx", folder / "True.onnx"]


def die(stage: str, line: list[str]) -> None:
    died = started("-c", DIES, f"suture.{stage}", *line, stderr=subprocess.PIPE)
    _, errors = died.communicate(timeout=120)
    assert died.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize(
    ("stage", "more", "results"),
    [
        ("surgery", [], {"model.onnx", "model.trt.onnx", "report.json"}),
        ("build", ["--weights", "constant"], {"model.engine", "engine.json", "kernels.json"}),
        pytest.param("build", ["--weights", "input"], {"model.engine", "engine.json", "kernels.json"}, marks=pytest.mark.slow),
        ("validate", [], {"report.json", "report.html", "summary.md", "polygraphy"}),
    ],
)
@pytest.mark.sample("surgery*")
def test_a_killed_stage_is_not_taken_for_a_finished_one(stage, more, results, model, tmp_path, capfd):
    out = tmp_path / "out"
    line = list(map(str, [*arguments(stage, model, tmp_path), "--out", out, *more]))
    die(stage, line)
    assert len(list(out.iterdir())) == 2  # one result, and the folder with the others
    assert read_manifest(out) is None
    assert import_module(f"suture.{stage}.__main__").main(line) == 0
    assert "up to date" not in capfd.readouterr().out
    assert {path.name for path in out.iterdir()} >= {*results, "manifest.json"}
    assert not (out / PARTIAL).exists()
    manifest = read_manifest(out)
    assert all((out / name).stat().st_size == size for name, size in manifest["outputs"].items())


@pytest.mark.slow  # the one above is of the same kind
def test_results_of_before_are_not_taken_for_those_of_a_killed_run(tmp_path, capfd):
    """The two may lie side by side: nothing says any more that they are whole."""
    model, out = tmp_path / "growing.onnx", tmp_path / "out"
    onnx.save(decoder_graph(static=False), model)
    line = [str(model), "--out", str(out)]
    assert surgery(line) == 0
    die("surgery", [*line, "--force"])
    assert surgery(line) == 0
    assert "up to date" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_build_takes_the_builder_with_it(tmp_path):
    """Else it would hold its memory, and write, beside the next run's."""
    onnx.save(build_graphs.decoder(layers=48), tmp_path / "model.trt.onnx")
    line = ["-m", "suture.build", tmp_path / "model.trt.onnx", "--out", tmp_path / "out"]
    running = started(*line, stdout=subprocess.PIPE)
    while "building" not in running.stdout.readline():
        assert running.poll() is None
    builders = [child for child in children(running.pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(builders) == 1
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    wait_for(lambda: not running_still(builders[0]), seconds=5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]

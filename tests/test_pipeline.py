"""pipeline.py as a user runs it: all stages on a small random checkpoint, again when up to date, and when things go wrong."""

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exporting import export, traced
from processes import ROOT, children, pipeline, running_still, started, wait_for
from safetensors.torch import save_file
from test_surgery_verify import WRONG, own_pass

from suture.core import command
from suture.core.command import FAULT, INTERRUPTED
from suture.core.manifest import read_manifest
from suture.export import stage as export_stage
from suture.export.__main__ import main as export_main
from suture.models.families.qwen import build

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "intermediate_size": 384,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}
STAGES = ["export", "surgery", "build", "validate"]


@dataclass(frozen=True)
class Finished:
    """A pipeline that has run and passed."""

    done: subprocess.CompletedProcess
    line: list[object]  # its command line
    cache: Path  # where the checkpoint's files lie
    cache_before: dict[Path, tuple[int, int]]  # what was written there

    @property
    def checkpoint(self) -> Path:
        return self.line[1]

    @property
    def out(self) -> Path:
        return self.line[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Finished]:
    """On a checkpoint as the Hugging Face hub stores it, read-only and on another file system where there is one:
    snapshots/COMMIT/NAME is a symbolic link to blobs/SHA."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as cache:
        folder = Path(cache, "models--some--model")
        snapshot, blobs = folder / "snapshots" / "0123abcd", folder / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (blobs / f"{0:064}").write_text(json.dumps(CONFIG), encoding="utf-8")
        torch.manual_seed(0)
        save_file(dict(build(CONFIG, "config").state_dict()), blobs / f"{1:064}")
        for number, name in enumerate(("config.json", "model.safetensors")):
            (snapshot / name).symlink_to(f"../../blobs/{number:064}")
        for path in (*blobs.iterdir(), blobs, snapshot):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = written(folder)
        line = ["--checkpoint", snapshot, "--out", tmp_path_factory.mktemp("finished") / "out", "--capacity", 64,
                "--compute-capability", "8.9", "--weights", "reference", "--engine-weights", "input"]  # fmt: skip
        done = pipeline(*line)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Finished(done, line, folder, before)


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each file's and folder's size and time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def stages_told(done: subprocess.CompletedProcess) -> list[str]:
    """The stages in the table that a pipeline ends with."""
    return re.findall(r"│ (\w+) +│ +[\d.]+ │", table(done))


def table(done: subprocess.CompletedProcess) -> str:
    return done.stdout[done.stdout.rindex("peak memory") :]


def exporting(out: Path, checkpoint: Path, **more: object) -> subprocess.Popen:
    """A pipeline whose first stage has begun to write."""
    running = started(ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out, stderr=subprocess.PIPE, **more)
    wait_for((out / "export" / ".partial").exists)
    return running


def test_all_stages_run_then_are_up_to_date(finished):
    assert stages_told(finished.done) == STAGES
    for stage in STAGES:
        assert re.search(rf"│ {stage} +│ +[\d.]+ │ +[\d,]+ MB │", table(finished.done)), table(finished.done)
        assert (finished.out / stage / "manifest.json").is_file()
        assert not (finished.out / stage / ".partial").exists()
    assert json.loads((finished.out / "validate" / "report.json").read_text())["verdict"] == "passed"
    assert (finished.out / "build" / "model.engine").stat().st_size > 0

    before = written(finished.out)
    second = pipeline(*finished.line)
    assert second.returncode == 0
    assert second.stdout.count("up to date") == 4
    after = written(finished.out)
    assert {path: after[path] for path in after if path.is_file()} == {path: before[path] for path in before if path.is_file()}


def test_a_read_only_cache_on_another_file_system(finished):
    """Nothing is copied, and nothing is written there."""
    out = finished.out
    if out.stat().st_dev == finished.cache.stat().st_dev:
        pytest.skip("only one file system here")
    assert written(finished.cache) == finished.cache_before
    assert (out / "export" / read_manifest(out / "export")["weights_root"]).resolve() == finished.cache / "blobs"
    engine = json.loads((out / "build" / "engine.json").read_text())["weights"]
    assert len(engine["inputs"]) == 10  # embedding, head, and four of each layer: gate and up are one
    assert all((out / "build" / engine["root"] / each["file"]).is_file() for each in engine["inputs"])
    assert not list(out.rglob("*.safetensors"))


def test_a_killed_stage_leaves_nothing_and_the_next_run_carries_on(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    running = exporting(out, finished.checkpoint)
    os.kill(int(children(running.pid)[0]), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == FAULT
    killed = "pipeline: export was killed by SIGKILL, as the system does when memory is short"
    assert errors.strip().splitlines() == [f"{killed}; run the same command to carry on"]
    assert [path.name for path in (out / "export").iterdir()] == [".partial"]

    monkeypatch.setattr(export_stage, "trace", lambda _, dtype: traced(finished.out / "export" / "model.onnx", dtype))
    export(finished.checkpoint, out, pipeline=True)
    assert {"model.onnx", "manifest.json"} <= {path.name for path in (out / "export").iterdir()}
    assert not (out / "export" / ".partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_pipeline_that_ends_takes_its_stage_with_it(ended, finished, tmp_path):
    """Else the stage would write on, beside the next run's."""
    running = exporting(tmp_path / "out", finished.checkpoint)
    (stage,) = children(running.pid)
    running.send_signal(ended)
    running.communicate(timeout=60)
    wait_for(lambda: not running_still(stage))
    assert [path.name for path in (tmp_path / "out" / "export").iterdir()] == [".partial"]


@pytest.mark.slow
def test_an_interrupted_pipeline_says_so_and_leaves_nothing(finished, tmp_path):
    """As Ctrl-C does, which reaches the stage as well."""
    out = tmp_path / "out"
    running = exporting(out, finished.checkpoint, start_new_session=True)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == INTERRUPTED
    again = "interrupted; run the same command again to carry on"
    assert sorted(errors.splitlines()) == [f"export: {again}", f"pipeline: {again}"]
    assert not list((out / "export").iterdir())


BROKEN = """
import os, signal, sys
stage = next((word[7:] for word in sys.orig_argv if word.startswith("suture.") and word[7:] in {stages}), None)
if stage == "{broken}":
    {how}
"""
IMPORTS = """
def raise_on_import(name):
    import types
    class Finder:
        def find_spec(self, found, path=None, target=None):
            if found == name:
                raise ImportError("broken")
    sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("broken", "how", "status"),
    [
        ("surgery", "raise_on_import('onnx_graphsurgeon')", FAULT),
        ("surgery", "os.kill(os.getpid(), signal.SIGSEGV)", FAULT),
        ("build", "os._exit(1)", FAULT),
        ("validate", "os._exit(1)", FAULT),
    ],
)
@pytest.mark.sample("surgery-raise*")
def test_nothing_runs_after_a_stage_that_broke(broken, how, status, finished, tmp_path):
    """An earlier run's results lie there, which are not this one's: no stage works on them, and no verdict is reported."""
    patch = BROKEN.format(stages=tuple(STAGES), broken=broken, how=how)
    (tmp_path / "sitecustomize.py").write_text(IMPORTS + patch, encoding="utf-8")
    done = pipeline(*finished.line, PYTHONPATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert done.returncode == status, done.stdout + done.stderr
    assert stages_told(done) == STAGES[: STAGES.index(broken) + 1]
    assert "passed" not in table(done)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_difference_of_surgerys_own_check_ends_the_pipeline(finished, tmp_path):
    wrong = own_pass(tmp_path, WRONG.format(number=1))
    done = pipeline(*finished.line, "--verify", "--pass", f"{wrong}@rms_norm")
    assert done.returncode == 1, done.stdout + done.stderr
    assert stages_told(done) == ["export", "surgery"]
    assert "passed" not in table(done)


def test_a_place_that_cannot_be_written_is_one_line(finished, capsys):
    line = ["--checkpoint", str(finished.checkpoint), "--out", "/sys/kernel/suture"]
    assert command.outcome("export", lambda: export_main(line)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: /sys/kernel/suture")
    assert line.endswith("choose a place that can be written")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--model", "no-such-model"], "--model no-such-model"),
        (["--model", "tiny-qwen", "--dtype", "float8"], "--dtype"),
    ],
)
@pytest.mark.sample("*nowhere*", "*--dtype")
def test_unusable_arguments_get_one_line_and_status_2(arguments, said, tmp_path):
    done = pipeline(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert said in lines[0]


def test_help_and_wrong_arguments_wait_for_no_library():
    """What each stage computes with is imported by the stage's own process."""
    asked = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path('pipeline.py', run_name='__main__')\n"
    asked += "except SystemExit: print({'torch', 'onnx_graphsurgeon', 'onnxruntime', 'matplotlib', 'tensorrt_rtx'} & set(sys.modules))"
    told, errors = started("-c", asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=60)
    assert "--compute-capability" in told
    assert told.splitlines()[-1] == "set()", errors

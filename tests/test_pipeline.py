"""pipeline.py as a user runs it: all stages on a small random checkpoint, again when up to date, and when things go wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_surgery_verify import WRONG, own_pass

from suture.core.command import FAULT, INTERRUPTED
from suture.core.manifest import read_manifest
from suture.models.families.qwen import build

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    save_file(dict(build(CONFIG, "config").state_dict()), folder / "model.safetensors")
    return folder


def pipeline(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "pipeline.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_all_stages_run_then_are_up_to_date(checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--checkpoint",
        checkpoint,
        "--out",
        out,
        "--capacity",
        64,
        "--compute-capability",
        "8.9",
        "--dtype",
        "float16",
    ]
    first = pipeline(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    table = first.stdout[first.stdout.rindex("peak memory") :]
    for stage in ("export", "surgery", "build", "validate"):
        assert re.search(rf"│ {stage} +│ +[\d.]+ │ +[\d,]+ MB │", table), table
        assert (out / stage / "manifest.json").is_file()
        assert not (out / stage / ".partial").exists()
    assert json.loads((out / "validate" / "report.json").read_text())["verdict"] == "passed"
    assert (out / "build" / "model.engine").stat().st_size > 0

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = pipeline(*arguments)
    assert second.returncode == 0
    assert second.stdout.count("up to date") == 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written


def test_a_killed_stage_leaves_nothing_and_the_next_run_carries_on(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out, "--capacity", "64"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((out / "export" / ".partial").exists)
    child = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == FAULT
    killed = "pipeline: export was killed by SIGKILL, as the system does when memory is short"
    assert errors.strip().splitlines() == [f"{killed}; run the same command to carry on"]
    assert [path.name for path in (out / "export").iterdir()] == [".partial"]

    again = subprocess.run(
        [sys.executable, "-m", "suture.export", "--checkpoint", checkpoint, "--out", out / "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert {"model.onnx", "manifest.json"} <= {path.name for path in (out / "export").iterdir()}
    assert not (out / "export" / ".partial").exists()


def test_a_killed_pipeline_takes_its_stage_with_it(checkpoint, tmp_path):
    """Else the stage would write on, beside the next run's."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    stage = wait_for(lambda: Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split())[0]
    wait_for((out / "export" / ".partial").exists)
    running.kill()
    running.wait()
    wait_for(lambda: not running_still(stage))
    assert [path.name for path in (out / "export").iterdir()] == [".partial"]


def test_an_interrupted_pipeline_says_so_and_leaves_nothing(checkpoint, tmp_path):
    """As Ctrl-C does, which reaches the stage as well."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    wait_for((out / "export" / ".partial").exists)
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


@pytest.mark.parametrize(
    ("broken", "how", "status"),
    [
        ("surgery", "raise_on_import('onnx_graphsurgeon')", FAULT),
        ("surgery", "os.kill(os.getpid(), signal.SIGSEGV)", FAULT),
        ("build", "os._exit(1)", FAULT),
        ("validate", "os._exit(1)", FAULT),
    ],
)
def test_nothing_runs_after_a_stage_that_broke(broken, how, status, finished, tmp_path):
    """An earlier run's results lie there, which are not this one's: no stage works on them, and no verdict is told."""
    patch = BROKEN.format(stages=("export", "surgery", "build", "validate"), broken=broken, how=how)
    (tmp_path / "sitecustomize.py").write_text(IMPORTS + patch, encoding="utf-8")
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, ROOT / "pipeline.py", *finished]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("peak memory") :]
    stages = ["export", "surgery", "build", "validate"]
    assert re.findall(r"│ (\w+) +│ +[\d.]+ │", table) == stages[: stages.index(broken) + 1]
    assert "passed" not in table
    assert "Traceback" not in done.stderr


IMPORTS = """
def raise_on_import(name):
    import types
    class Finder:
        def find_spec(self, found, path=None, target=None):
            if found == name:
                raise ImportError("broken")
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[object]:
    """The command line of a pipeline that has run and passed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    torch.manual_seed(0)
    save_file(dict(build(CONFIG, "config").state_dict()), folder / "checkpoint" / "model.safetensors")
    line = ["--checkpoint", folder / "checkpoint", "--out", folder / "out", "--capacity", 64, "--compute-capability", "8.9"]
    done = pipeline(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    return line


def test_a_difference_of_surgerys_own_check_ends_the_pipeline(finished, tmp_path):
    wrong = own_pass(tmp_path, WRONG.format(number=1))
    done = pipeline(*finished, "--verify", "--pass", f"{wrong}@rms_norm")
    assert done.returncode == 1, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("peak memory") :]
    assert re.findall(r"│ (\w+) +│ +[\d.]+ │", table) == ["export", "surgery"]
    assert "passed" not in table


def test_a_terminated_pipeline_takes_its_stage_with_it(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "pipeline.py", "--checkpoint", checkpoint, "--out", out]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    stage = wait_for(lambda: Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split())[0]
    wait_for((out / "export" / ".partial").exists)
    running.terminate()
    running.wait()
    wait_for(lambda: not running_still(stage))


def running_still(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(reached: Callable, seconds: float = 60):
    """What `reached` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.02)
    return found


def test_a_read_only_cache_on_another_file_system(checkpoint, tmp_path):
    """As the Hugging Face hub stores a checkpoint: snapshots/COMMIT/NAME is a symbolic link to blobs/SHA. Nothing is
    copied, and nothing is written there."""
    with another_file_system(tmp_path) as elsewhere:
        cache = elsewhere / "models--some--model"
        snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, file in enumerate(sorted(checkpoint.iterdir())):
            (blobs / f"{number:064}").write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
        for path in (*blobs.iterdir(), blobs, snapshot):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = written(elsewhere)
        out = tmp_path / "out"
        line = ["--checkpoint", snapshot, "--out", out, "--capacity", 64, "--compute-capability", "8.9"]
        done = pipeline(*line, "--weights", "reference", "--engine-weights", "input")
        assert done.returncode == 0, done.stdout + done.stderr
        assert written(elsewhere) == before
        assert (out / "export" / read_manifest(out / "export")["weights_root"]).resolve() == blobs
        assert json.loads((out / "validate" / "report.json").read_text())["verdict"] == "passed"
        engine = json.loads((out / "build" / "engine.json").read_text())["weights"]
        assert len(engine["inputs"]) == 10  # embedding, head, and four of each layer: gate and up are one
        assert all((out / "build" / engine["root"] / each["file"]).is_file() for each in engine["inputs"])
        assert not list(out.rglob("*.safetensors"))


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each file's and folder's size and time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@contextmanager
def another_file_system(here: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == here.stat().st_dev:
        pytest.skip("only one file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_place_that_cannot_be_written_is_one_line(checkpoint):
    done = subprocess.run([sys.executable, "-m", "suture.export", "--checkpoint", checkpoint, "--out", "/sys/kernel/suture"],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
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
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert "--compute-capability" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()", done.stderr

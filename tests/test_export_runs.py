"""Runs of export: unusable checkpoints, a killed one and the next, and what is up to date."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exporting import ROOT, export, traced

from suture.core.errors import UserError
from suture.export import stage
from suture.export import weights as export_weights


def without_second_shard(folder: Path) -> None:
    next(folder.glob("*00002-of*")).unlink()


DAMAGES = {
    r"00002-of-00002\.safetensors: no such file": without_second_shard,
    "truncated": lambda folder: os.truncate(next(folder.glob("*00002-of*")), 5000),
    r"config\.json: no such file": lambda folder: (folder / "config.json").unlink(),
    "no such folder": shutil.rmtree,
}


@pytest.mark.parametrize("says", DAMAGES)
def test_unusable_checkpoints_are_refused(checkpoint, tmp_path, says):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    DAMAGES[says](other)
    with pytest.raises(UserError, match=says):
        export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_in_one_line(checkpoint, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    without_second_shard(other)
    line = [sys.executable, "-m", "suture.export", "--checkpoint", str(other), "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("export: ")
    assert done.stderr.count("\n") == 1
    assert "no such file" in done.stderr


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_and_the_next_carries_on(traced_before, exported, checkpoint, tmp_path):
    out = tmp_path / "out"
    code = f"import test_export_runs; test_export_runs.die_while_copying({str(exported)!r}, {str(checkpoint)!r}, {str(out)!r})"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [".partial"]
    assert sorted(path.name for path in (out / ".partial").iterdir()) == [".lock", "model.safetensors"]
    export(checkpoint, out, weights="copy")
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.onnx", "model.safetensors"]


def die_while_copying(exported: str, checkpoint: str, out: str) -> None:
    convert = export_weights._converted

    def convert_and_die(checkpoint: object, name: str, dtype: str):
        yield from convert(checkpoint, name, dtype)
        os.kill(os.getpid(), signal.SIGKILL)

    export_weights._converted = convert_and_die
    stage.trace = lambda model, dtype: traced(Path(exported), dtype)
    export(Path(checkpoint), Path(out), weights="copy")


def test_up_to_date(traced_before, checkpoint, tmp_path, capsys):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    model = export(other, tmp_path / "out")
    written = model.stat().st_mtime_ns
    export(other, tmp_path / "out")
    assert "up to date" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == written
    os.utime(next(other.glob("*00001-of*")))  # the same content
    export(other, tmp_path / "out")
    assert capsys.readouterr().out.count("up to date") == 1
    export(other, tmp_path / "out", force=True)
    export(other, tmp_path / "out", weights="reference")  # another option
    shard = next(other.glob("*00001-of*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")  # another input
    export(other, tmp_path / "out", weights="reference")
    (tmp_path / "out" / "model.onnx").unlink()  # a result gone
    export(other, tmp_path / "out", weights="reference")
    assert "up to date" not in capsys.readouterr().out

"""What a stage may replace and what it leaves: whatever lies in its folder, and whenever it dies."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph

from suture.build import __main__ as build_stage
from suture.core import manifest as core_manifest
from suture.core import stage as core_stage
from suture.core.errors import UserError
from suture.core.manifest import PARTIAL, read_manifest, result
from suture.core.stage import Stage
from suture.export import __main__ as export_stage
from suture.surgery import capacity
from suture.surgery.__main__ import main as surgery
from suture.validate import __main__ as validate_stage

ROOT = Path(__file__).parents[1]


def run(out: Path, inputs: list[Path] = (), results: dict[str, str] | None = None, name: str = "surgery", **options) -> bool:
    """A stage that writes these files, unless they are up to date; returns whether it ran."""
    stage = Stage(name, out, list(inputs), options)
    if stage.up_to_date():
        return False
    with stage.writing() as folder:
        for file, content in (results or {"a": "1", "sub/b": "2"}).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(content)
    return True


def contents(folder: Path) -> dict[str, bytes | str]:
    """All below a folder: of files the bytes, of links where they lead."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        for path in found
    }


# --- what may be replaced ----------------------------------------------------------------------------------------------


def a_foreign_file(out: Path):
    (out / "a").write_text("mine")


def a_foreign_file_below(out: Path):
    (out / "sub").mkdir()
    (out / "sub" / "b").write_text("mine")


def a_folder_in_a_files_place(out: Path):
    (out / "a").mkdir()


def a_file_in_a_folders_place(out: Path):
    (out / "sub").write_text("mine")


def a_link_to_nothing(out: Path):
    (out / "a").symlink_to("nowhere")


def a_folder_that_leads_elsewhere(out: Path):
    (out.parent / "elsewhere").mkdir()
    (out / "sub").symlink_to("../elsewhere")


def another_stages_results(out: Path):
    run(out, name="build")


def anothers_manifest(out: Path):
    (out / "manifest.json").write_text('{"name": "an app", "icons": []}')


def a_manifest_that_is_damaged(out: Path):
    run(out)
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes()[:-9])


def a_result_that_is_an_input(out: Path):
    run(out)
    (out / "manifest.json").unlink()


def another_stages_interrupted_move(out: Path):
    (out / PARTIAL).mkdir()
    (out / PARTIAL / core_manifest.MOVING).write_text('{"stage": "build", "outputs": ["a"]}')
    (out / "a").write_text("of build")


def a_link_in_partials_place(out: Path):
    (out.parent / "elsewhere").mkdir()
    (out.parent / "elsewhere" / "a").write_text("mine")
    (out / PARTIAL).symlink_to("../elsewhere")


@pytest.mark.parametrize(
    ("lies_there", "said"),
    [
        (a_foreign_file, "was not written by surgery"),
        (a_foreign_file_below, "was not written by surgery"),
        (a_folder_in_a_files_place, "is a folder"),
        (a_file_in_a_folders_place, "was not written by surgery"),
        (a_link_to_nothing, "was not written by surgery"),
        (a_folder_that_leads_elsewhere, "lies outside"),
        (another_stages_results, "holds the results of build"),
        (anothers_manifest, "is no manifest of surgery"),
        (a_manifest_that_is_damaged, "is no manifest of surgery"),
        (a_result_that_is_an_input, "was not written by surgery"),
        (another_stages_interrupted_move, "holds results of build"),
        (a_link_in_partials_place, "is in the way"),
    ],
)
def test_nothing_of_anothers_is_replaced(lies_there, said, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lies_there(out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        run(out, another="option")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["a", "sub/b", "other", "sub/link"])
def test_no_input_is_replaced(place, tmp_path):
    """Nor does a folder take results beside an input of theirs; below, an input that is no result may stay."""
    out = tmp_path / "out"
    if place == "sub/b":  # an earlier run's result
        run(out)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    if place == "sub/link":
        (tmp_path / "elsewhere").write_text("input")
        (out / place).symlink_to("../../elsewhere")
    elif place != "sub/b":
        (out / place).write_text("input")
    before = contents(tmp_path)
    if place == "sub/link":
        assert run(out, [out / place])
        assert contents(tmp_path).items() >= before.items()
        return
    with pytest.raises(UserError, match=r"is an input of|which surgery reads"):
        run(out, [out / place])
    assert contents(tmp_path) == before


def test_a_manifest_cannot_make_others_files_its_stages_own(tmp_path):
    """It may come from anywhere, and what it lists is removed once it is stale."""
    run(tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / "link").symlink_to("..")
    manifest = read_manifest(tmp_path / "out")
    manifest["outputs"] |= {"../mine": 4, str(tmp_path / "mine"): 4, "link/mine": 4, "a\0": 1}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lies outside"):
        run(tmp_path / "out", other=1)
    assert (tmp_path / "mine").read_text() == "mine"
    del manifest["outputs"]["link/mine"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert run(tmp_path / "out", other=1)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_keeps_what_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for value in (1, 2):
        assert run(out, value=value)
    assert (out / "notes.txt").read_text() == "mine"


def called(stage, *arguments: object, monkeypatch) -> object:
    monkeypatch.setattr(sys, "argv", ["stage", *map(str, arguments)])
    return stage()


@pytest.fixture
def graphs(tmp_path) -> Path:
    """A folder with x.onnx and a pipeline's export/ and surgery/."""
    folder = tmp_path / "graphs"
    folder.mkdir()
    onnx.save(decoder_graph(static=False), folder / "x.onnx")
    run(folder / "export", results={"model.onnx": "export's"}, name="export")
    assert surgery([str(folder / "x.onnx"), "--out", str(folder / "surgery"), "--capacity", "16"]) == 0
    return folder


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        (lambda: surgery(), ["x.onnx", "--out", "."]),
        (lambda: surgery(), ["x.onnx", "--out", "export"]),
        (lambda: surgery(), ["surgery/model.onnx", "--out", "surgery"]),
        (lambda: capacity.main(), ["surgery", "--capacity", "8", "--out", "surgery"]),
        (lambda: capacity.main(), ["surgery", "--capacity", "8", "--out", "export"]),
        (lambda: build_stage.main(), ["surgery/model.trt.onnx", "--out", "surgery"]),
        (lambda: build_stage.main(), ["surgery/model.trt.onnx", "--out", "export"]),
        (lambda: validate_stage.main(), ["x.onnx", "surgery/model.onnx", "--out", "export"]),
        (lambda: validate_stage.main(), ["x.onnx", "surgery/model.onnx", "--out", "surgery"]),
        (lambda: validate_stage.main(), ["--network", "surgery/model.onnx", "--out", "surgery"]),
    ],
)
def test_each_stage_leaves_its_inputs_and_other_stages_alone(stage, arguments, graphs, monkeypatch):
    before = contents(graphs)
    monkeypatch.chdir(graphs)
    with pytest.raises(UserError, match="name another folder with --out"):
        called(stage, *arguments, *["--force"] * ("--network" not in arguments), monkeypatch=monkeypatch)
    assert contents(graphs) == before


@pytest.mark.parametrize("out", [".", "surgery"])
def test_export_leaves_the_checkpoint_alone(out, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    run(folder / "surgery")
    before = contents(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="name another folder with --out"):
        called(export_stage.main, "--checkpoint", ".", "--dtype", "float16", "--out", out, "--force", monkeypatch=monkeypatch)
    assert contents(folder) == before


# --- what is left ------------------------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_an_edited_verdict_is_not_believed(graphs, monkeypatch, capsys):
    line = [graphs / "x.onnx", graphs / "surgery" / "model.onnx", "--out", graphs / "compared"]
    assert called(validate_stage.main, *line, monkeypatch=monkeypatch) == 0
    report = graphs / "compared" / "report.json"
    report.write_text(report.read_text().replace('"verdict": "passed"', '"verdict": "secret"'))
    assert called(validate_stage.main, *line, monkeypatch=monkeypatch) == 0
    assert json.loads(report.read_text())["verdict"] == "passed"
    assert "up to date" not in capsys.readouterr().out


def test_what_an_earlier_run_wrote_and_this_one_does_not_goes(tmp_path):
    run(tmp_path / "out", results={"a": "1", "sub/deep/b": "2", "sub/c": "3"})
    (tmp_path / "out" / "sub" / "mine").write_text("mine")
    assert run(tmp_path / "out", results={"a": "4"}, other=1)
    assert {path for path, content in contents(tmp_path / "out").items() if content} == {"a", "sub/mine", "manifest.json"}


def test_results_are_what_the_manifest_lists(tmp_path):
    run(tmp_path / "out")
    (tmp_path / "out" / "c").write_text("an earlier run's")
    assert result(tmp_path / "out", "a") == tmp_path / "out" / "a"
    assert result(tmp_path / "out", "c") is None
    (tmp_path / "out" / "a").unlink()
    assert result(tmp_path / "out", "a") is None
    (tmp_path / "put" / PARTIAL).mkdir(parents=True)
    (tmp_path / "put" / "a").write_text("put there by hand")
    assert result(tmp_path / "put", "a")
    (tmp_path / "put" / PARTIAL / core_manifest.MOVING).write_text("")  # or by a run that was killed
    assert result(tmp_path / "put", "a") is None


@pytest.mark.seconds
def test_surgery_without_an_option_removes_what_it_wrote_with_it(tmp_path):
    onnx.save(decoder_graph(static=False), tmp_path / "model.onnx")
    out = tmp_path / "out"
    line = [str(tmp_path / "model.onnx"), "--out", str(out), "--capacity", "16"]
    assert surgery([*line, "--onnxruntime"]) == 0
    assert result(out, "model.ort.onnx")
    assert surgery(line) == 0
    assert not (out / "model.ort.onnx").exists()


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_a_killed_run_knows_its_own_files_the_next_time(moves, tmp_path, monkeypatch):
    """Whichever rename it dies at, and where the run after it fails: what it has written is not taken for anybody else's."""
    out, replace = tmp_path / "out", os.replace
    run(out, results={"a": "1", "old": "1"})
    (out / "mine").write_text("mine")

    class Killed(BaseException):
        pass

    def dies(source, target):
        nonlocal moves
        moves -= 1
        if moves < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    monkeypatch.setattr(core_stage, "_clear", lambda folder, but: None)  # a killed process clears nothing
    with pytest.raises(Killed):
        run(out, results={"a": "2", "b": "2", "c": "2", "d": "2"}, other=1)
    monkeypatch.undo()
    assert read_manifest(out) is None
    with pytest.raises(ZeroDivisionError), Stage("surgery", out, [], {}).writing():
        raise ZeroDivisionError
    assert run(out, results={"a": "3", "b": "3"}, other=1)
    assert {path for path, content in contents(out).items() if content} == {"a", "b", "mine", "manifest.json"}
    assert not (out / PARTIAL).exists()


@pytest.mark.parametrize("full", range(4))
def test_a_full_disk_loses_nothing(full, tmp_path, monkeypatch):
    """Whichever write of text finds it full: the results before are still there, and up to date, or the new ones are."""
    run(tmp_path / "out", more=False)
    before, left = contents(tmp_path / "out"), [full]
    write = Path.write_text

    def written(path: Path, *arguments, **named) -> int:
        left[0] -= 1
        if left[0] == -1 and path.parent.name == PARTIAL:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", written)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out", results={"a": "new"}, more=True)
    assert contents(tmp_path / "out") == before
    assert not run(tmp_path / "out", more=False)


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    out = tmp_path / "out"
    waits = (
        "import sys; "
        "from pathlib import Path; from suture.core.stage import alone\nwith alone(Path(sys.argv[1])): print(flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", waits, out], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    with pytest.raises(UserError, match=f"process {other.pid} is writing there; wait for it, or end it"):
        run(out)
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    other.kill()
    other.wait()
    assert run(out)
    assert {path.name for path in out.iterdir()} == {"a", "sub", "manifest.json"}

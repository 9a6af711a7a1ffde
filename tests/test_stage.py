"""What a stage may replace, what its results depend on, and what it leaves: whatever lies in its folder, and whenever it dies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_graphs
import onnx
import pytest
from decoder_graphs import decoder_graph

from suture.build import __main__ as build_stage
from suture.core import identity
from suture.core import manifest as core_manifest
from suture.core import stage as core_stage
from suture.core.errors import UserError
from suture.core.manifest import MANIFEST, PARTIAL, read_manifest, result
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


# --- what results depend on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_another_content_is_seen_whatever_its_times_say(large, tmp_path, monkeypatch):
    """As after cp -p, or where a clock was set back."""
    monkeypatch.setattr(identity, "LARGE", 0 if large else 1 << 24)
    weights, out = tmp_path / "weights", tmp_path / "out"
    weights.write_bytes(b"one")
    times = weights.stat()
    assert run(out, [weights])
    assert not run(out, [weights])
    for change in (lambda: weights.write_bytes(b"two"), lambda: os.replace(tmp_path / "other", weights)):
        (tmp_path / "other").write_bytes(b"six")
        os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
        change()
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert run(out, [weights])
        assert not run(out, [weights])


def test_what_is_large_is_hashed_once_by_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "LARGE", 3)
    hashed = []
    hash_of = identity.Contents._hash
    monkeypatch.setattr(
        identity.Contents, "_hash", lambda self, file, path, size: hashed.append(path) or hash_of(self, file, path, size)
    )
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    assert run(tmp_path / "export", [weights], name="export")
    first = tmp_path / "export" / "a"
    assert run(tmp_path / "surgery", [first, weights])
    assert run(tmp_path / "build", [tmp_path / "surgery" / "a", weights], name="build")
    assert hashed.count(weights) == 1
    os.utime(weights)
    for _ in range(3):  # the first of which writes down the new times
        assert not run(tmp_path / "export", [weights], name="export")
        assert hashed.count(weights) == 2


def forbidden(*_, **__):
    raise PermissionError("no")


@pytest.mark.parametrize("change", ["moved", "touched", "copied"])
def test_what_is_up_to_date_is_hashed_again_once(change, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "LARGE", 3)
    folder = tmp_path / "at"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    assert run(folder / "out", [folder / "weights"], {"a": "large"})
    if change == "moved":
        folder = folder.rename(tmp_path / "elsewhere")
    elif change == "copied":
        folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(folder / "weights", times=(0, 0))
    assert not run(folder / "out", [folder / "weights"])
    assert not (folder / "out" / PARTIAL).exists()
    monkeypatch.setattr(identity.Contents, "_hash", forbidden)
    assert not run(folder / "out", [folder / "weights"])


def test_a_folder_that_cannot_be_written_is_up_to_date(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"weights")
    assert run(tmp_path / "out", [tmp_path / "weights"])
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    os.utime(tmp_path / "weights", times=(0, 0))
    monkeypatch.setattr(core_stage.os, "replace", forbidden)
    assert not run(tmp_path / "out", [tmp_path / "weights"])
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_anothers_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("mine")
    (tmp_path / "weights").write_bytes(b"weights")
    with pytest.raises(UserError, match="was not written by surgery"):
        Stage("surgery", tmp_path / "out", [tmp_path / "weights"], {}, writes=["a"])
    assert (tmp_path / "out" / "a").read_text() == "mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"7" + file.read_bytes()[1:]),
        lambda file: file.write_bytes(file.read_bytes() + b" "),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["a byte flipped", "a byte more", "gone", "a folder"],
)
@pytest.mark.parametrize("large", [False, True])
def test_damaged_results_are_not_up_to_date(damage, large, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "LARGE", 0 if large else 1 << 24)
    run(tmp_path / "out")
    assert Stage("surgery", tmp_path / "out", [], {}).up_to_date()
    damage(tmp_path / "out" / "sub" / "b")
    assert not Stage("surgery", tmp_path / "out", [], {}).up_to_date()


@pytest.mark.parametrize("change", [lambda file: file.write_text("new"), lambda file: file.unlink()], ids=["other", "gone"])
def test_inputs_that_change_meanwhile_end_the_run(change, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.write_text("old")
    run(out, [model])
    before = contents(out)
    model.write_text("own")
    writing = Stage("surgery", out, [model], {}).writing()
    (writing.__enter__() / "a").write_text("of the old one")
    change(model)
    with pytest.raises(UserError, match=r"model: (has changed since this run began|no such file)"):
        writing.__exit__(None, None, None)
    assert contents(out) == before


def test_no_sources_are_no_identity(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="has no sources"):
        Stage("no_such_stage", tmp_path, [], {})


def change_a_weight(file: Path) -> None:
    """Another value, the same size and times, in the largest tensor: in the middle of the file."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2 + 3] ^= 0x40
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("more", [[], ["--quantize", "int8"]], ids=["as they are", "quantised"])
@pytest.mark.seconds
def test_surgery_and_validate_see_new_weights(more, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    onnx.save(
        decoder_graph(static=False), source / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=256
    )
    line = [str(source / "model.onnx"), "--out", str(out), "--capacity", "16", *more]
    graphs = [source / "model.onnx", out / "model.onnx", "--out", tmp_path / "compared", "--tolerance", "0.5"]
    for changed in (False, True):
        if changed:
            before = contents(out)
            change_a_weight(source / "w.data")
        assert surgery(line) == 0
        assert "up to date" not in capsys.readouterr().out
        called(validate_stage.main, *graphs, monkeypatch=monkeypatch)
        assert "up to date" not in capsys.readouterr().out
        assert surgery(line) == 0
        called(validate_stage.main, *graphs, monkeypatch=monkeypatch)
        assert capsys.readouterr().out.count("up to date") == 2
    changed = {name for name, content in contents(out).items() if content != before.get(name)}
    assert changed & {"w.data", "model.onnx"}


def test_build_sees_new_weights_and_a_damaged_engine(tmp_path, monkeypatch, capsys):
    model = build_graphs.by_reference(build_graphs.decoder(), tmp_path / "surgery", tmp_path / "checkpoint")
    line = [model, "--out", tmp_path / "out", "--compute-capability", "8.9"]

    def built() -> bool:
        called(lambda: build_stage.main(), *line, monkeypatch=monkeypatch)
        return "up to date" not in capsys.readouterr().out

    assert built()
    change_a_weight(tmp_path / "checkpoint" / "model.safetensors")
    assert built()
    assert not built()
    change_a_weight(tmp_path / "out" / "model.engine")
    assert built()


@pytest.mark.seconds
def test_an_edited_verdict_is_not_believed(graphs, monkeypatch, capsys):
    line = [graphs / "x.onnx", graphs / "surgery" / "model.onnx", "--out", graphs / "compared"]
    assert called(validate_stage.main, *line, monkeypatch=monkeypatch) == 0
    report = graphs / "compared" / "report.json"
    report.write_text(report.read_text().replace('"verdict": "passed"', '"verdict": "secret"'))
    assert called(validate_stage.main, *line, monkeypatch=monkeypatch) == 0
    assert json.loads(report.read_text())["verdict"] == "passed"
    assert "up to date" not in capsys.readouterr().out


# --- what is left ------------------------------------------------------------------------------------------------------


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

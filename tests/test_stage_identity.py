"""What a stage's results depend on: contents, whatever their times say, and the code that ran."""

import os
import shutil
from pathlib import Path

import build_graphs
import onnx
import pytest
from decoder_graphs import decoder_graph
from test_stage import called, contents, run

from suture.build import __main__ as build_stage
from suture.core import identity
from suture.core import stage as core_stage
from suture.core.errors import UserError
from suture.core.manifest import MANIFEST, PARTIAL
from suture.core.stage import Stage
from suture.surgery.__main__ import main as surgery
from suture.validate import __main__ as validate_stage


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

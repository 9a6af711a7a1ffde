"""A random walk of edits, runs, kills and runs side by side: after each run that is done, the results are those of a fresh one.

Three small stages over Stage itself, each of which reads what the one before wrote, and the weights, as the real ones do.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph

from suture.core import identity
from suture.core import stage as core_stage
from suture.core.errors import UserError
from suture.core.stage import Stage
from suture.surgery.__main__ import main as surgery

READS = {
    "export": ("config", "weights"),
    "surgery": ("export/model", "weights"),
    "build": ("surgery/model", "surgery/sub/form", "weights"),
}
OPTIONS = {"export": ("dtype",), "surgery": ("capacity", "more"), "build": ("batch",)}
KILLED, REFUSED = 9, 2


def run(root: Path, name: str, options: dict, out: Path | None = None) -> None:
    """A stage whose results follow from all that it reads; with `more` it writes files that it else does not."""
    inputs = [root / path for path in READS[name]]
    stage = Stage(name, out or root / name, inputs, options)
    if stage.up_to_date():
        return
    with stage.writing() as folder:
        digest = hashlib.sha256(repr((name, sorted(options.items()))).encode())
        for path in inputs:
            digest.update(path.read_bytes())
        results = {
            "model": "",
            "sub/form": "a form of ",
            **({"more": "more of ", "sub/deep/more": ""} if options.get("more") else {}),
        }
        for file, text in results.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text + digest.hexdigest())


def results(folder: Path) -> dict[str, bytes]:
    """All but the manifest, and what is somebody else's."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("manifest.json", "mine")}


class Walk:
    def __init__(self, folder: Path, seed: int):
        self.random, self.root, self.log = random.Random(seed), folder / "root", []
        self.options = {"dtype": 0, "capacity": 8, "more": False, "batch": 1}
        self.done = self.killed = self.refused = 0
        self.root.mkdir()
        (self.root / "config").write_bytes(b"config")
        (self.root / "weights").write_bytes(b"w" * 64)

    def chosen(self, name: str) -> dict:
        return {option: self.options[option] for option in OPTIONS[name]}

    def step(self) -> None:
        actions = (self.runs, self.runs, self.runs_all, self.edits, self.edits, self.option, self.damages, self.times, self.is_killed,
                   self.side_by_side, self.moves, self.loses, self.changes_meanwhile)  # fmt: skip
        action = self.random.choice(actions)
        self.log.append(action.__name__)
        action()

    def runs(self, name: str = "") -> None:
        name = name or self.random.choice(list(READS))
        self.log.append(name)
        if not all((self.root / path).is_file() for path in READS[name]):
            with pytest.raises(UserError):
                run(self.root, name, self.chosen(name))
            return
        try:
            run(self.root, name, self.chosen(name))
        except UserError as error:  # a manifest that is gone makes results somebody else's: they are cleared by hand
            if not any(words in str(error) for words in ("would be replaced", "is no manifest", "is a folder")):
                raise
            self.refused += 1
            shutil.rmtree(self.root / name)
            return
        self.done += 1
        fresh = self.root.parent / "fresh"
        run(self.root, name, self.chosen(name), out=fresh)
        assert results(self.root / name) == results(fresh), self.log[-30:]
        shutil.rmtree(fresh)

    def runs_all(self) -> None:
        for name in READS:
            self.runs(name)

    def edits(self) -> None:
        """Other content of the same size; its times stay, or it is another file of the same times (cp -p, mv)."""
        path = self.root / self.random.choice(("config", "weights"))
        content, times = bytearray(path.read_bytes()), path.stat()
        content[self.random.randrange(len(content))] = self.random.randrange(256)
        target = path if self.random.random() < 0.5 else self.root / "other"
        target.write_bytes(content)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(target, path)

    def option(self) -> None:
        name = self.random.choice(list(self.options))
        self.options[name] = not self.options[name] if name == "more" else self.random.randrange(3)

    def damages(self) -> None:
        """A result is flipped, cut, emptied, gone, or a link to nothing."""
        found = sorted(
            path for name in READS for path in (self.root / name).rglob("*") if path.is_file() and path.name != "mine"
        )
        if not found:
            return
        path = self.random.choice(found)
        content, times = path.read_bytes(), path.stat()
        kind = self.random.randrange(4)
        if kind == 0:
            path.unlink()
            return
        path.write_bytes(
            (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2], b"")[kind - 1] if content else b"x"
        )
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def times(self) -> None:
        """The clock was set, or files were unpacked: any of them is of any time."""
        for path in self.root.rglob("*"):
            if self.random.random() < 0.3:
                os.utime(path, times=(self.random.randrange(2**31), self.random.randrange(2**31)))

    def is_killed(self) -> None:
        """At a random rename or removal, as the last thing that the process does."""
        name, left = self.random.choice(list(READS)), self.random.randrange(6)
        self.log.append(f"{name} at {left}")
        self.killed += self.children([(name, self.chosen(name), left)]) == [KILLED]

    def side_by_side(self) -> None:
        """Two runs with other options into one folder: each is done, or refused; then what is there is whole."""
        name = self.random.choice(list(READS))
        statuses = self.children([(name, dict.fromkeys(OPTIONS[name], value), None) for value in (1, 2)])
        assert set(statuses) <= {0, REFUSED}, (statuses, self.log[-30:])
        self.runs(name)

    def children(self, asked: list[tuple[str, dict, int | None]]) -> list[int]:
        started = []
        for name, options, left in asked:
            child = os.fork()
            if child == 0:
                self.become(name, options, left)
            started.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]

    def become(self, name: str, options: dict, left: int | None) -> None:
        status = 3
        try:
            if left is not None:
                for function in ("replace", "unlink", "rmdir"):
                    setattr(os, function, dying(getattr(os, function), [left]))
            run(self.root, name, options)
            status = 0
        except UserError:
            status = REFUSED
        finally:
            os._exit(status)

    def moves(self) -> None:
        other = self.root.with_name("moved" if self.root.name == "root" else "root")
        os.rename(self.root, other)
        self.root = other

    def loses(self) -> None:
        name = self.random.choice(list(READS))
        if self.random.random() < 0.5:
            shutil.rmtree(self.root / name, ignore_errors=True)
        else:
            (self.root / name / "manifest.json").unlink(missing_ok=True)

    def changes_meanwhile(self) -> None:
        """Weights that change while a stage is at work: nothing is written."""
        name = self.random.choice(list(READS))
        if not all((self.root / path).is_file() for path in READS[name]):
            return
        before = self.files(name)
        try:
            stage = Stage(name, self.root / name, [self.root / path for path in READS[name]], {"another": 1})
            with stage.writing() as folder:
                (folder / "model").write_text("of the weights before")
                (self.root / "weights").write_bytes(self.random.randbytes(64))
        except UserError:  # of the weights, or where somebody else's results lie
            assert self.files(name) == before, self.log[-30:]
            return
        pytest.fail("it took other weights for those that it had read")

    def files(self, name: str) -> dict[Path, bytes]:
        found = [path for path in (self.root / name).rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in found if ".partial" not in path.parts}


def dying(function: Callable, left: list[int]) -> Callable:
    def dies(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            os._exit(KILLED)
        return function(*arguments, **named)

    return dies


def walk(folder: Path, seed: int, steps: int, monkeypatch) -> Walk:
    monkeypatch.setattr(core_stage, "versions", lambda package: {"code": package})  # hashing it takes longer than all else
    walked = Walk(folder, seed)
    for _ in range(steps):
        walked.step()
    assert min(walked.done, walked.killed) > steps // 50, "hardly anything was done, or killed"
    return walked


@pytest.mark.parametrize("seed", [0])
@pytest.mark.seconds
def test_results_are_those_of_a_fresh_run(seed, tmp_path, monkeypatch):
    walk(tmp_path, seed, 150, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_results_are_those_of_a_fresh_run_for_long(seed, tmp_path, monkeypatch):
    walk(tmp_path, seed, 1000, monkeypatch)


@pytest.mark.parametrize("blind", ["by size", "inputs not read again"])
def test_the_walk_sees_a_stage_that_does_not_look(blind, tmp_path, monkeypatch):
    """By sizes alone, as before; or whose inputs may change meanwhile."""
    if blind == "by size":
        monkeypatch.setattr(identity.Contents, "_hash", lambda self, file, path, size: str(size))
    else:
        read = Stage._read
        monkeypatch.setattr(Stage, "_read", lambda self: self.identity["inputs"] if hasattr(self, "identity") else read(self))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        walk(tmp_path, 0, 300, monkeypatch)


@pytest.mark.seconds
def test_surgery_after_edits_is_that_of_a_fresh_run(tmp_path):
    """The same over the real stage, whose weights it copies."""
    choose, source, out = random.Random(5), tmp_path / "source", tmp_path / "out"
    source.mkdir()
    saved = {"location": "w.data", "size_threshold": 256}
    onnx.save(decoder_graph(static=False), source / "model.onnx", save_as_external_data=True, **saved)
    for step in range(6):
        path = (
            source / "w.data"
            if step % 2
            else choose.choice(sorted(each for each in out.rglob("*.*") if each.is_file()) or [source / "w.data"])
        )
        if path.name != "manifest.json":
            content, times = bytearray(path.read_bytes()), path.stat()
            content[choose.randrange(len(content))] ^= 1
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        more = choose.choice(([], ["--onnxruntime"], ["--skip", "swish"]))
        for folder in (out, tmp_path / f"fresh{step}"):
            assert surgery([str(source / "model.onnx"), "--out", str(folder), "--capacity", choose.choice(["16"]), *more]) == 0
        ours, fresh = results(out), results(folder)
        assert ours.keys() == fresh.keys()
        assert all(ours[name] == fresh[name] for name in ours if not name.endswith(".json")), step

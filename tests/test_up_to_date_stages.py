"""The same walk over the real stages, of a model of two parts: foreign graphs with their weights beside them, a pass of the user's with a
module that it imports, and golden outputs of the whole: after each run that is done, its results are those of a fresh one."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph
from test_up_to_date import KILLED, REFUSED, dying

from suture.core import stage as core_stage
from suture.core.errors import UserError
from suture.surgery.__main__ import main as surgery
from suture.validate.options import ValidateOptions
from suture.validate.stage import save_golden

VISION = """<ir_version: 10, opset_import: ["": 18]> vision (float[n, 4] x) => (float[n, 4] y)
    <float[4, 4] w = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 1, 1, 1, 1}> { a = MatMul(x, w) b = Clip(a) y = Relu(b) }"""
PASS = '''"""Clip(x) → x, TIMES times over."""
from {helper} import TIMES

def run(graph):
    return graph.match(skip, graph.nodes("Clip")) if TIMES else 0

def skip(graph, clip):
    graph.redirect(clip.outputs[0], clip.inputs[0])
    return True
'''
PARTS = ("vision", "decoder")
OPTIONS = ([], ["--skip", "swish"], ["--onnxruntime"], ["--pass"])


class Walk:
    def __init__(self, folder: Path, seed: int):
        self.random, self.root, self.log = random.Random(seed), folder / "root", []
        self.helper = f"helper_of_{os.getpid()}_{seed}"  # a name that no other test has imported
        self.chosen, self.done, self.killed = dict.fromkeys(PARTS, 0), 0, 0
        first = onnx.parser.parse_model(VISION)
        for tensor in first.graph.initializer:  # as bytes, which alone can lie elsewhere
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
        for name, model, least in zip(PARTS, (first, decoder_graph(static=False)), (64, 1024)):
            export = self.root / name / "export"
            export.mkdir(parents=True)
            onnx.save(model, export / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=least)
            self.describe(export, ["model.onnx", "w.data"], stage="export")
        listed = [{"name": name, "kind": kind, "inputs": {}, "outputs": {}} for name, kind in zip(PARTS, ("graph", "decoder"))]
        (self.root / "parts.json").write_text(json.dumps({"parts": listed}))
        self.describe(self.root, ["parts.json"], stage="export.parts")
        (self.root / f"{self.helper}.py").write_text("TIMES = 1\n")
        (self.root / "own.py").write_text(PASS.format(helper=self.helper))

    @staticmethod
    def describe(folder: Path, names: list[str], stage: str) -> None:
        outputs = {name: (folder / name).stat().st_size for name in names}
        said = {"stage": stage, "outputs": outputs, "options": {}, "seconds": 1.0, "peak_memory_bytes": 1}
        (folder / "manifest.json").write_text(json.dumps(said))

    def command(self, name: str, out: Path) -> list[str]:
        more = list(OPTIONS[self.chosen[name]])
        more += [str(self.root / "own.py")] if more == ["--pass"] else ["--capacity", "16"] if name == "decoder" else []
        return [str(self.root / name / "export" / "model.onnx"), "--out", str(out), "--no-verify", *more]

    def step(self) -> None:
        actions = (
            self.runs,
            self.runs,
            self.edits,
            self.edits,
            self.option,
            self.damages,
            self.is_killed,
            self.is_killed,
            self.times,
            self.side_by_side,
            self.moves,
            self.goldens,
        )
        action = self.random.choice(actions)
        self.log.append(action.__name__)
        action()

    def surgery(self, name: str, out: Path) -> None:
        sys.modules.pop(self.helper, None)  # each run is a process of its own, else
        sys.path.insert(0, str(self.root))
        try:
            status = surgery(self.command(name, out))
        finally:
            sys.path.remove(str(self.root))
        assert status == 0, self.log

    def runs(self, name: str = "") -> None:
        name = name or self.random.choice(PARTS)
        out, fresh = self.root / name / "surgery", self.root / name / "fresh"
        try:
            self.surgery(name, out)
        except UserError as error:  # a manifest that is gone, or cut, makes results somebody else's
            if not any(words in str(error) for words in ("would be replaced", "is no manifest")):
                raise
            shutil.rmtree(out)
            self.surgery(name, out)
        self.surgery(name, fresh)
        assert results(out) == results(fresh), self.log
        shutil.rmtree(fresh)
        self.done += 1

    def goldens(self) -> None:
        """Of all parts: never over others, unless that is asked for; then those of a fresh run."""
        there, fresh = self.root / "golden", self.root / "golden-fresh"
        force = self.random.random() < 0.7
        if (there / "golden.json").exists() and not force:
            before = results(there)
            with pytest.raises(UserError, match="is there already"):
                save_golden(self.root, there, ValidateOptions())
            assert results(there) == before, self.log
            return
        save_golden(self.root, there, ValidateOptions(), force)
        save_golden(self.root, fresh, ValidateOptions())
        assert results(there) == results(fresh), self.log
        shutil.rmtree(fresh)

    def edits(self) -> None:
        """Other values of weights, another graph, or another pass, at the same size and times."""
        name, kind = self.random.choice(PARTS), self.random.randrange(3)
        path = [
            self.root / name / "export" / "w.data",
            self.root / name / "export" / "model.onnx",
            self.root / f"{self.helper}.py",
        ][kind]
        content, times = bytearray(path.read_bytes()), path.stat()
        if kind == 0:
            content[self.random.randrange(len(content) // 4) * 4] ^= 1  # the last bit of a float32
        elif kind == 1:
            model = onnx.load_model_from_string(bytes(content))
            model.producer_version = str(self.random.randrange(10, 99))
            content = model.SerializeToString()
        else:
            content = f"TIMES = {self.random.randrange(2)}\n".encode()
        target = path if self.random.random() < 0.5 else self.root / "other"
        target.write_bytes(content)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(target, path)

    def option(self) -> None:
        self.chosen[self.random.choice(PARTS)] = self.random.randrange(len(OPTIONS))

    def damages(self) -> None:
        """A result is flipped, or gone."""
        found = sorted(path for name in PARTS for path in (self.root / name / "surgery").rglob("*") if path.is_file())
        if not found:
            return
        path = self.random.choice(found)
        content, times = path.read_bytes(), path.stat()
        if self.random.random() < 0.3 or not content:
            path.unlink()
            return
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def is_killed(self) -> None:
        """At a random rename or removal."""
        name, left = self.random.choice(PARTS), self.random.randrange(3)
        (self.root / name / "surgery" / "report.json").unlink(missing_ok=True)  # so that there is something to do
        self.killed += self.children([(name, self.chosen[name], left)]) == [KILLED]

    def times(self) -> None:
        """The clock was set, or files were unpacked: any of them is of any time, before or after all others."""
        for path in self.root.rglob("*"):
            if self.random.random() < 0.5:
                os.utime(path, times=(self.random.randrange(2**31), self.random.randrange(2**31)))

    def side_by_side(self) -> None:
        """Two runs with other options into one folder: each is done, or refused; then what is there is whole."""
        name = self.random.choice(PARTS)
        (self.root / name / "surgery" / "report.json").unlink(missing_ok=True)
        statuses = self.children([(name, option, None) for option in self.random.sample(range(3), 2)])
        assert set(statuses) <= {0, REFUSED}, (statuses, self.log)
        self.runs(name)

    def children(self, asked: list[tuple[str, int, int | None]]) -> list[int]:
        """Exit statuses of surgery on these parts with these options, all at once, each killed where it says so."""
        started = []
        for name, option, left in asked:
            child = os.fork()
            if child == 0:
                self.become(name, option, left)
            started.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]

    def become(self, name: str, option: int, left: int | None) -> None:
        status = 3
        try:
            if left is not None:
                for function in ("replace", "unlink", "rmdir"):
                    setattr(os, function, dying(getattr(os, function), [left]))
            self.chosen[name] = option
            self.surgery(name, self.root / name / "surgery")
            status = 0
        except UserError:
            status = REFUSED
        finally:
            os._exit(status)

    def moves(self) -> None:
        other = self.root.with_name("moved" if self.root.name == "root" else "root")
        os.rename(self.root, other)
        self.root = other


def results(folder: Path) -> dict[str, bytes]:
    """All but what says when and where it was made."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: content for name, content in found.items() if not name.endswith((".json", ".svg")) or name.startswith("decoder.")
    }


def walk(folder: Path, seed: int, steps: int, monkeypatch) -> Walk:
    monkeypatch.setattr(core_stage, "versions", lambda package: {"code": package})  # hashing it takes longer than all else
    walked = Walk(folder, seed)
    for _ in range(steps):
        walked.step()
    for name in PARTS:
        walked.runs(name)
    return walked


@pytest.mark.seconds
def test_results_of_parts_are_those_of_a_fresh_run(tmp_path, monkeypatch):
    assert walk(tmp_path, 5, 12, monkeypatch).done > 2  # two runs side by side and another clock among its steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_results_of_parts_are_those_of_a_fresh_run_for_long(seed, tmp_path, monkeypatch):
    walked = walk(tmp_path, seed, 60, monkeypatch)
    assert min(walked.done, walked.killed) > 2


def test_a_module_that_a_pass_imports_is_read_again(tmp_path, monkeypatch):
    """Its content decides what the pass does, as the pass's own does."""
    walked = Walk(tmp_path, 7)
    walked.chosen["vision"] = OPTIONS.index(["--pass"])
    walked.runs("vision")
    assert "Clip" not in [node.op_type for node in onnx.load(walked.root / "vision/surgery/model.onnx").graph.node]
    (walked.root / f"{walked.helper}.py").write_text("TIMES = 0\n")
    walked.runs("vision")
    assert "Clip" in [node.op_type for node in onnx.load(walked.root / "vision/surgery/model.onnx").graph.node]

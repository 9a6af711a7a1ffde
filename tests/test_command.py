"""Exit statuses, and the one line that goes with each: whatever a stage raises, and whatever becomes of its streams."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from suture.core.command import DONE, FAULT, FOUND_DIFFERENCE, INTERRUPTED, UNUSABLE_INPUT, run
from suture.core.errors import UserError

ROOT = Path(__file__).parents[1]


class OfOurs(Exception):
    pass


def os_error(number: int, name: str | None = "some/file") -> OSError:
    return OSError(number, os.strerror(number), name)


def deep(depth: int = 0) -> None:
    deep(depth + 1)


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stage"])


@pytest.mark.parametrize(
    ("main", "status", "says"),
    [
        (lambda: None, DONE, ""),
        (lambda: FOUND_DIFFERENCE, FOUND_DIFFERENCE, ""),
        (raising(UserError("x.onnx", "is not a\ngraph", "export it")), UNUSABLE_INPUT, "x.onnx: is not a graph; export it"),
        (raising(UserError("\x1b[31m", "is\r bad", "go")), UNUSABLE_INPUT, "\\x1b[31m: is  bad; go"),
        (raising(KeyboardInterrupt()), INTERRUPTED, "interrupted; run the same command again"),
        *((raising(os_error(number)), UNUSABLE_INPUT, f"some/file: {os.strerror(number).lower()}; ")
          for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
                         errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOENT, errno.EEXIST, errno.ETXTBSY)),
        (raising(os_error(errno.ENOSPC, None)), UNUSABLE_INPUT, "no space left on device; free some"),
        (raising(OSError("a library's own words")), UNUSABLE_INPUT, "a library's own words"),
        (raising(MemoryError()), UNUSABLE_INPUT, "memory"),
        (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), UNUSABLE_INPUT, "memory"),
        (deep, UNUSABLE_INPUT, "nested deeper"),
        (lambda: "\udcff".encode(), UNUSABLE_INPUT, "\\udcff: is not UTF-8"),
        (raising(OfOurs("what\nhappened")), FAULT, "OfOurs: what"),
        (raising(ConnectionResetError(errno.ECONNRESET, "a child is gone")), FAULT, "ConnectionResetError"),
        (raising(SystemExit(2)), UNUSABLE_INPUT, ""),
    ],
)  # fmt: skip
def test_each_outcome_has_its_status_and_one_line(main, status, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run("stage", main)
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == bool(says)
    assert says in printed.err
    kept = [path.read_text(encoding="utf-8") for path in tmp_path.glob("suture-stage-*.txt")]
    assert len(kept) == (status == FAULT)
    assert all("Traceback" in text and str(path.name) in printed.err for text, path in zip(kept, tmp_path.glob("*.txt")))


def test_a_fault_is_told_where_its_traceback_cannot_be_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="3"):
        run("stage", raising(OfOurs("it")))
    assert "its traceback could not be kept" in capsys.readouterr().err


WORK = """
import sys
from suture.core.command import run
def main():
    print("caf\\u00e9 \\udcff" * 20000)
    print("more", flush=True)
    print("on the side", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
    return {status}
run("stage", main)
"""


@pytest.mark.parametrize("redirection", ["| true", "| head -c 1", ">&-", ">&- 2>&-", "2>&1 | true", "<&- >&-", "> /dev/null"])
@pytest.mark.parametrize("status", [DONE, FOUND_DIFFERENCE])
def test_the_work_is_done_and_has_its_status_wherever_its_output_goes(redirection, status, tmp_path):
    done = shell(f"{redirection}; exit ${{PIPESTATUS[0]}}", WORK.format(status=status), tmp_path / "out")
    assert done.returncode == status, done.stderr
    assert (tmp_path / "out").read_text() == "done"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", ["", "--help", "--version", "convert --help"])
@pytest.mark.parametrize("redirection", ["| true", ">&-"])
def test_the_command_itself_outlives_its_reader(arguments, redirection):
    line = f'"{sys.executable}" -m suture {arguments} {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (DONE, "")


def test_a_full_disk_behind_standard_output_is_one_line(tmp_path):
    done = shell("> /dev/full", "from suture.core.command import run\nrun('stage', lambda: print('result'))", tmp_path / "out")
    assert done.returncode == UNUSABLE_INPUT
    assert done.stderr.decode().startswith("stage: standard output: no space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                         {"PYTHONIOENCODING": "latin-1"}])  # fmt: skip
def test_output_is_utf8_whatever_the_locale(environment, tmp_path):
    work = "from suture.core.command import run\nrun('stage', lambda: print('caf\\u00e9 \\u2194 \\udcff'))"
    done = shell("", work, tmp_path / "out", environment)
    assert done.returncode == DONE, done.stderr
    assert done.stdout == "café ↔ \\udcff\n".encode()


def test_a_name_that_is_no_utf8_is_one_line(tmp_path):
    command = [sys.executable, "-m", "suture.surgery", "model.onnx", "--out", os.fsencode(tmp_path) + b"/\xff"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == UNUSABLE_INPUT
    assert done.stderr.count(b"\n") == 1
    assert b"\\udcff: is not UTF-8; rename it" in done.stderr


@pytest.mark.parametrize("module", ["raise ImportError('a library is broken')", "import nothing_like_it", "1 +"])
def test_an_import_that_fails_is_a_fault_and_no_difference(module, tmp_path):
    """By itself, Python ends with 1 there. The pipeline runs its stages like this."""
    (tmp_path / "broken_stage.py").write_text(module)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "suture.core.command", "broken_stage"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == FAULT
    assert done.stderr.count("\n") == 1
    assert len(list(tmp_path.glob("suture-broken_stage-*.txt"))) == 1


BROKEN_LIBRARIES = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "rich", "filelock", "numpy", "onnx_graphsurgeon", "polygraphy"):
            raise ImportError(f"{name} is broken")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("line", [
    "suture.export --checkpoint c --out o", "suture.surgery m.onnx --out o", "suture.build m.onnx --out o", "suture.validate o",
    "suture.generate o --prompt a", "suture.validate.check_command m.onnx", "suture.validate.compare_command a.onnx b.onnx",
    "suture.models.convert a.bin o", "suture.surgery.capacity m.onnx --capacity 4 --out o",
    "suture.surgery.ranks m.onnx --tensor-parallel 2 --out o", "suture.pipeline --checkpoint c --out o",
    "suture run --checkpoint c --out o",
])  # fmt: skip
def test_a_broken_library_is_one_line_however_a_command_is_run(line, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN_LIBRARIES)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == FAULT, done.stderr
    assert "is broken" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def shell(redirection: str, code: str, out: Path, environment: dict | None = None) -> subprocess.CompletedProcess:
    """bash, for what is done with the standard streams."""
    line = f'"{sys.executable}" -c "$CODE" "{out}" {redirection}'
    own = {"CODE": code, "PYTHONPATH": str(ROOT), "TMPDIR": str(out.parent), **(environment or {})}
    return subprocess.run(["bash", "-c", line], env=os.environ | own, capture_output=True)


def test_interrupted_is_130_for_a_shell():
    assert INTERRUPTED == 128 + signal.SIGINT

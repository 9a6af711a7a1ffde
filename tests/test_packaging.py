"""The package: what it lists, and that it is found from wherever it is used. .ci/package does the same with a wheel."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(*arguments: str, cwd: Path, paths: list[Path] = ()) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_packages_are_the_folders():
    folders = SETTINGS["package-dir"]
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in folders.items() for path in (ROOT / folder).rglob("__init__.py")
    }  # fmt: skip
    assert set(SETTINGS["packages"]) == found
    assert len(SETTINGS["packages"]) == len(found)
    modules = [
        path
        for folder in folders.values()
        for path in (ROOT / folder).rglob("*.py")
        if not path.parent.name.startswith("tiny-")
    ]
    assert all((path.parent / "__init__.py").is_file() for path in modules)


def test_a_class_name_means_one_thing():
    places = defaultdict(list)
    for folder in (*SETTINGS["package-dir"].values(), "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for statement in ast.parse(path.read_text()).body:
                if isinstance(statement, ast.ClassDef) and not statement.name.startswith("_"):
                    places[statement.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 200
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("stage", ["export", "surgery", "build", "validate", "generate"])
def test_each_stage_runs_from_the_repository_and_from_elsewhere(stage, tmp_path):
    for module, cwd, paths in ((stage, ROOT, []), (f"suture.{stage}", ROOT, []), (f"suture.{stage}", tmp_path, [ROOT])):
        done = python("-m", module, "--help", cwd=cwd, paths=paths)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {stage} ")
        assert done.stderr == ""


def test_others_modules_are_not_hidden(tmp_path):
    """A program elsewhere that has a build or tests of its own keeps them."""
    (tmp_path / "build.py").write_text("OWN = True\n")
    code = "import build, suture.build.options; assert build.OWN; assert suture.build.options.MAX_PAST"
    assert python("-c", code, cwd=tmp_path, paths=[ROOT]).stderr == ""


def test_child_processes_find_the_package(tmp_path):
    """TensorRT's parser runs in one, wherever the command is given."""
    onnx.save(decoder_graph(static=False), tmp_path / "model.onnx")
    done = python("-m", "suture", "check", "model.onnx", cwd=tmp_path, paths=[ROOT])
    assert done.returncode in (0, 1), done.stderr
    assert " layers of " in done.stdout
    done = python("-c", "from suture.core import child; print(child.environment()['PYTHONPATH'])", cwd=ROOT)
    assert done.stdout.split(os.pathsep)[0].strip() == str(ROOT)


def test_the_hash_of_the_code_is_that_of_the_package_in_use(tmp_path):
    """Two copies of the package: the same hash until a file changes that the stage runs."""
    for folder in {*SETTINGS["package-dir"].values()}:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz")
        )
    shutil.copy(ROOT / "pipeline.py", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def code(paths: list[Path]) -> str:
        asked = "from suture.core.identity import versions; print(versions('surgery')['code'])"
        done = python("-c", asked, cwd=elsewhere, paths=paths)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    first = code([tmp_path])
    assert first == code([ROOT])
    (tmp_path / "validate" / "plots.py").write_text("changed = True\n")
    assert code([tmp_path]) == first
    (tmp_path / "surgery" / "rows.py").write_text("changed = True\n")
    assert code([tmp_path]) != first
    shutil.rmtree(tmp_path / "runtime")
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").touch()
    (tmp_path / "runtime" / "__init__.py").rename(tmp_path / "runtime" / "nothing")
    done = python("-c", "from suture.core.identity import versions; versions('surgery')", cwd=elsewhere, paths=[tmp_path])
    assert "has no sources" in done.stderr or "No module named" in done.stderr

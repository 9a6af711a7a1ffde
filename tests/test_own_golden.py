"""validate --save-golden and --golden: a user's model against what it computed before. And that Polygraphy reads what we write."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import numpy_helper

from suture.core import command
from suture.surgery.__main__ import main as surgery
from suture.validate.__main__ import main as validate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "out"
    (out / "export").mkdir(parents=True)
    onnx.save(decoder_graph(static=False), out / "export" / "model.onnx")
    assert surgery([str(out / "export" / "model.onnx"), "--out", str(out / "surgery"), "--capacity", "64"]) == 0
    assert run(out, "--save-golden", out.parent / "saved") == 0
    return out


@pytest.fixture
def out(made, tmp_path) -> Path:
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def run(out: Path, *arguments: object) -> int:
    return command.outcome("validate", lambda: validate([str(out), *map(str, arguments)]))


@pytest.mark.seconds
def test_both_graphs_agree_with_what_was_saved(out, capsys):
    assert run(out, "--golden", out.parent / "saved", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(level["title"], level["status"]) for level in found["levels"]] == [
        ("Golden ↔ exported graph", "passed"),
        ("Golden ↔ portable graph", "passed"),
    ]
    steps = [scenario["name"] for scenario in found["levels"][1]["comparison"]["scenarios"] if scenario["status"] == "passed"]
    assert {"prompt", "one token", "decoding", "padded prompt", "rows of different lengths"} <= set(steps)
    about = json.loads((out.parent / "saved" / "golden.json").read_text())
    assert {"versions", "seed", "format", "parts"} == set(about)
    assert about["parts"]["decoder"]["tolerance"] == 1e-4


def test_a_changed_weight_is_a_difference(out, capsys):
    path = out / "export" / "model.onnx"
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "q.1")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.02, weight.name))
    onnx.save(model, path)
    assert run(out, "--golden", out.parent / "saved", "--json", "--junit", out.parent / "junit.xml") == 1
    assert [level["status"] for level in json.loads(capsys.readouterr().out)["levels"]] == ["different", "passed"]
    assert '<failure message="' in (out.parent / "junit.xml").read_text()


def test_saved_outputs_are_replaced_only_by_force(out, capsys):
    saved = out.parent / "saved"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert run(out, "--save-golden", saved) == 2
    assert "is there already; name another folder, or replace it with --force" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert run(out, "--save-golden", saved, "--force", "--seed", "3") == 0
    assert (saved / "decoder.polygraphy.json").read_bytes() != before["decoder.polygraphy.json"]
    assert run(out, "--golden", saved) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--golden", "nowhere"), "no such file"),
        (("--golden", "broken"), "has no 'format'"),
        (("--golden", "other"), "has the outputs of something else"),
        (("--save-golden", "out/surgery/model.onnx"), "is a file"),
        (("--golden", "saved", "--seed", "1"), "--seed says nothing with --golden"),
        (("--golden", "saved", "--save-golden", "new"), "goes with no other such option"),
        (("--golden", "saved", "--json", "saved/golden.json"), "is read here and would be replaced"),
    ],
)
def test_what_cannot_be_used_is_one_line(out, arguments, said, capsys):
    root = out.parent
    shutil.copytree(root / "saved", root / "broken")
    (root / "broken" / "golden.json").write_text("{}")
    shutil.copytree(root / "saved", root / "other")
    about = json.loads((root / "other" / "golden.json").read_text())
    about["parts"]["decoder"]["steps"][0]["outputs"]["more"] = {"shape": [1], "largest": 1.0}
    (root / "other" / "golden.json").write_text(json.dumps(about))
    given = [word if word.startswith("--") or word.isdigit() else root / word for word in arguments]
    assert run(out, *given) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_polygraphy_reads_all_that_holds_outputs(out):
    """`polygraphy inspect data`, as it is installed, knows nothing of our types."""
    assert run(out, "--force") == 0
    kinds = [(out / "validate" / "polygraphy").glob("2-*.json"), (out / "validate" / "polygraphy").glob("3-*.json")]
    kinds.append((out.parent / "saved").glob("*.polygraphy.json"))
    lowered, portable = out / "surgery" / "model.trt.onnx", out / "surgery" / "model.onnx"
    network = out.parent / "network"
    arguments = ["--network", lowered, "--reference", portable, "--out", network]
    assert command.outcome("validate", lambda: validate(list(map(str, arguments)))) == 0
    kinds.append(network.glob("*.polygraphy.json"))
    files = [sorted(each)[0] for each in kinds]
    code = """
import sys
from polygraphy.tools import main
for path in sys.argv[1:]:
    sys.argv = ["polygraphy", "inspect", "data", path]
    assert not main(), path
"""
    read = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, cwd=out)
    assert read.returncode == 0, read.stdout + read.stderr
    assert read.stdout.count("logits") >= len(files) == 4

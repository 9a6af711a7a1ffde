"""suture compare: two graphs of any kind, down to the first tensor that differs, and two of validate's reports."""

import json
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import numpy_helper

from suture.core import command
from suture.validate.compare_command import main

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(factor: float = 1.0, output: str = "y") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N, 4] x) '
        f"=> (float[N, 4] {output}) {{ a = MatMul(x, w) b = Relu(a) {output} = Add(b, x) }}"
    )
    weight = np.random.default_rng(7).standard_normal((4, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight * np.float32(factor), "w"))
    return model


def saved(folder: Path, **models: onnx.ModelProto) -> list[str]:
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    return [str(folder / f"{name}.onnx") for name in models]


def run(arguments: list[str]) -> int:
    return command.outcome("compare", lambda: main(arguments))


def test_graphs_without_caches_agree(tmp_path, capsys):
    assert run(saved(tmp_path, a=plain(), b=plain())) == 0
    assert "passed" in capsys.readouterr().out


def test_the_first_node_that_differs_is_named(tmp_path, capsys):
    graphs = saved(tmp_path, a=plain(), b=plain(1.004))
    assert run([*graphs, "--json", "--junit", str(tmp_path / "junit.xml")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["exit_status"]) == ("different", 1)
    assert "first at the MatMul" in found["levels"][0]["reason"]
    suite = xml.parse(tmp_path / "junit.xml").getroot()
    assert int(suite.get("failures")) >= 1
    assert run([*graphs, "--tolerance", "0.05"]) == 0


@pytest.mark.seconds
def test_decoders_are_compared_step_by_step_and_in_meaning(tmp_path, capsys):
    """In float16 a scale that is off by 0.4 % is within its rounding; as float32 copies it is not."""
    good, static, wrong = (
        decoder_graph(False, np.float16),
        decoder_graph(True, np.float16),
        decoder_graph(True, np.float16, scale=1.004),
    )
    assert run(saved(tmp_path, a=good, b=static)) == 0
    assert "As float32 copies" not in capsys.readouterr().err
    assert run(saved(tmp_path, a=good, c=wrong)) == 1
    assert "in float32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("missing", "no such file"),
        ("text", "not an ONNX"),
        ("decoder", "has caches, and the other graph has none"),
        ("renamed", "only one has the output y, z"),
        ("report", "give two of a kind"),
    ],
)
def test_what_cannot_be_compared_is_one_line(other, said, tmp_path, capsys):
    first, _ = saved(tmp_path, a=plain(), renamed=plain(output="z"))
    saved(tmp_path, decoder=decoder_graph(False))
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "report.json").write_text("{}")
    second = tmp_path / ("report.json" if other == "report" else f"{other}.onnx")
    with pytest.raises(SystemExit) if other == "report" else pytest.MonkeyPatch.context() as ended:
        assert main_status([first, str(second)]) == 2
    if other == "report":
        assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def main_status(arguments: list[str]) -> int:
    if arguments[1].endswith(".json"):
        return main(arguments)
    return run(arguments)


def test_a_result_replaces_nothing_that_is_read(tmp_path, capsys):
    graphs = saved(tmp_path, a=plain(), b=plain())
    assert run([*graphs, "--json", graphs[0]]) == 2
    assert "is read here and would be replaced" in capsys.readouterr().err


# --- reports ----------------------------------------------------------------------------------------------------------------


def report(
    status: str = "passed", error: float = 1e-7, kernels: int = 40, size: int = 1000, version: str = "1", kl: float = 1e-6
) -> dict:
    worst = {"output": "logits", "error": error, "step": 0, "problem": None}
    level = {"number": 2, "title": "Exported ↔ portable graph", "status": status, "comparison": {"worst": worst}}
    text = {"number": 5, "title": "Tokens on real text", "status": "passed", "comparison": None,
            "tokens": {"readings": [{"name": "text", "mean_kl": kl}]}}  # fmt: skip
    profile = {"name": "decode", "kernels": kernels, "total_bytes": size}
    engine = {"engine_bytes": size, "profiles": [profile]}
    return {"levels": [level, text], "parts": [{"name": "decoder", "engine": engine}], "versions": {"onnxruntime": version}}


def reports(folder: Path, first: dict, second: dict) -> list[str]:
    paths = [folder / name / "validate" / "report.json" for name in ("a", "b")]
    for path, value in zip(paths, (first, second)):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))
    return [str(paths[0]), str(paths[1].parents[1])]  # a file, and a pipeline's folder


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"status": "different"}, "level 2, Exported ↔ portable graph"),
        ({"status": "not run"}, "level 2, Exported ↔ portable graph"),
        ({"error": 1e-6}, "level 2, Exported ↔ portable graph: worst error"),
        ({"kl": 1e-5}, "level 5, Tokens on real text: mean KL of text"),
        ({"kernels": 41}, "decoder: kernels in decode"),
        ({"size": 1100}, "decoder: bytes of the engine"),
    ],
)
def test_what_became_worse_is_named(change, what, tmp_path, capsys):
    paths = reports(tmp_path, report(), report(**change))
    assert run([*paths, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert what in [each["what"] for each in found["changes"] if each["worse"]]
    assert run([*reversed(paths), "--json"]) == 0  # the other way round it became better


@pytest.mark.parametrize("lost", ["engine", "part"])
def test_a_lost_engine_is_worse(lost, tmp_path, capsys):
    without = report()
    if lost == "engine":
        del without["parts"][0]["engine"]
    else:
        without["parts"] = []
    paths = reports(tmp_path, report(), without)
    assert run(paths) == 1
    assert "decoder: engine" in capsys.readouterr().out
    assert run([*reversed(paths)]) == 0


def test_a_version_and_a_rounding_are_no_worse(tmp_path, capsys):
    paths = reports(tmp_path, report(), report(error=1.5e-7, version="2"))
    assert run(paths) == 0
    assert "2 changes, 0 for the worse" in capsys.readouterr().out


def test_what_is_no_report_is_one_line(tmp_path, capsys):
    paths = reports(tmp_path, report(), {"levels": []})
    assert run(paths) == 2
    assert "is not a report of validate's" in capsys.readouterr().err

"""python -m validate: a pipeline's folder or two graphs in, a report out, and unusable input in one line."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import decoder, decoder_graph
from onnx import TensorProto
from polygraphy.comparator import RunResults, SimpleCompareFunc
from test_validate_tokens import TEXT, Letters

from suture.core.errors import UserError
from suture.validate.__main__ import main
from suture.validate.compare import DIFFERENT, NOT_RUN, PASSED, SAVED_BYTES, Comparison, OutputError, ScenarioResult
from suture.validate.level import Level
from suture.validate.options import ValidateOptions
from suture.validate.report import make_report, render, verdict, write_report
from suture.validate.stage import validate_pipeline
from suture.validate.tokens import compare_tokens

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """A pipeline's folder as far as it goes without a checkpoint: an exported and a portable graph."""
    write(tmp_path / "export", decoder_graph(static=False))
    write(tmp_path / "surgery", decoder_graph(static=True))
    return tmp_path


def write(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.slow
def test_a_level_is_told_as_it_begins_and_ends_where_there_is_no_terminal(pipeline):
    command = [sys.executable, "-m", "suture.validate", str(pipeline)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        first = [next(running.stdout) for _ in range(3)]
        assert not (pipeline / "validate" / "report.json").exists()  # the lines come while it works
        told = "".join(first) + running.stdout.read()
    told = [line for line in told.splitlines() if line.startswith("validate: level")]
    assert told[0] == "validate: level 1, PyTorch ↔ exported graph …"
    assert re.fullmatch(r"validate: level 1, PyTorch .*: not run, the checkpoint .* is not here \(\d+\.\d s\)", told[1])
    assert told[2] == "validate: level 2, Exported ↔ portable graph …"
    assert re.fullmatch(r"validate: level 2, .*: passed, \d\.\de-0\d of 1e-04 \(\d+\.\d s\)", told[3])
    assert [line.endswith("…") for line in told] == [True, False] * 5


def test_a_pipeline_folder_gets_a_report(pipeline):
    assert validate_pipeline(pipeline, ValidateOptions()) == 0
    report = json.loads((pipeline / "validate" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["verdict"] == PASSED
    assert [level["status"] for level in report["levels"]] == [NOT_RUN, PASSED, NOT_RUN, NOT_RUN, NOT_RUN]
    assert all(level["reason"] for level in report["levels"] if level["status"] == NOT_RUN)
    html = (pipeline / "validate" / "report.html").read_text()
    assert all(level["title"].replace("'", "&#39;") in html for level in report["levels"])
    assert not re.search(r"src=|@import|url\((?!#)|<link|<script|href=\"(?!#)", html)  # needs nothing beside it


def test_the_report_shows_a_layer_before_and_after(pipeline):
    """Both pictures, and only those that surgery's manifest knows."""
    for when in ("before", "after"):
        (pipeline / "surgery" / f"{when}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><text>{when} it</text></svg>'
        )
    (pipeline / "surgery" / "report.json").write_text('{"unfused": []}')
    validate_pipeline(pipeline, ValidateOptions())
    assert "data:image" not in (pipeline / "validate" / "report.html").read_text()
    outputs = dict.fromkeys(("model.onnx", "report.json", "before.svg", "after.svg"), 0)
    manifest = {"outputs": outputs, "seconds": 1, "peak_memory_bytes": 1, "options": {}}
    (pipeline / "surgery" / "manifest.json").write_text(json.dumps(manifest))
    validate_pipeline(pipeline, ValidateOptions(), force=True)
    html = (pipeline / "validate" / "report.html").read_text()
    assert "<script" not in html
    shown = [
        base64.b64decode(data).decode() for data in re.findall(r'<img [^>]*src="data:image/svg\+xml;base64,([^"]*)">', html)
    ]
    assert [re.search("<text>(.*)</text>", picture)[1] for picture in shown] == ["before it", "after it"]


def test_run_results_are_polygraphys_and_small(pipeline):
    validate_pipeline(pipeline, ValidateOptions())
    files = sorted((pipeline / "validate" / "polygraphy").iterdir())
    assert [file.name for file in files] == [
        "2-chunked-prompt.json", "2-decode.json", "2-mixed-batch.json", "2-prompt.json", "2-ragged-batch.json",
        "2-to-the-last-slot.json",
    ]  # fmt: skip
    exported, portable = RunResults.load(str(files[1])).values()
    assert len(exported) == len(portable) == 13
    assert exported[0].runner_name == "exported"
    assert bool(SimpleCompareFunc(atol=1e-4)(exported[-1], portable[-1])["logits"])
    for step in exported:
        assert all(value.nbytes <= SAVED_BYTES for value in step.values())


def test_a_difference_exits_1_also_when_up_to_date(pipeline, capsys):
    write(pipeline / "surgery", decoder_graph(static=True, disturb=1e-2))
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    assert json.loads((pipeline / "validate" / "report.json").read_text())["verdict"] == DIFFERENT
    capsys.readouterr()
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    assert "up to date, different" in capsys.readouterr().out
    write(pipeline / "surgery", decoder_graph(static=True))
    assert validate_pipeline(pipeline, ValidateOptions()) == 0


def test_nothing_run_is_not_passed(pipeline):
    (pipeline / "surgery" / "model.onnx").unlink()
    assert validate_pipeline(pipeline, ValidateOptions()) == 0
    report = json.loads((pipeline / "validate" / "report.json").read_text())
    assert report["verdict"] == NOT_RUN
    assert "passed" not in {level["status"] for level in report["levels"]}


def test_two_graphs_on_the_command_line(tmp_path, capsys):
    reference = write(tmp_path / "reference", decoder_graph(static=False))
    candidate = write(tmp_path / "candidate", decoder_graph(static=True, nan=np.nan))
    assert main([str(reference), str(candidate), "--out", str(tmp_path / "out")]) == 1
    assert "not a number" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)["verdict"] == DIFFERENT
    assert "not a number" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/nowhere"], "has no export/model.onnx"),
        (["{folder}", "--text", "{folder}/none.txt"], "none.txt: no such file"),
        (["{folder}/export/model.onnx", "{folder}/nowhere.onnx"], "nowhere.onnx: no such file"),
        (["{folder}/export/model.onnx", "{folder}/broken.onnx"], "not an ONNX"),
    ],
)
def test_unusable_input_is_one_line(pipeline, arguments, says, monkeypatch):
    (pipeline / "broken.onnx").write_bytes(b"no protobuf at all")
    monkeypatch.setattr(sys, "argv", ["validate", *(each.format(folder=pipeline) for each in arguments)])
    with pytest.raises(UserError, match=says) as raised:
        main()
    assert "\n" not in str(raised.value)


def test_verdict_is_different_if_anything_is():
    def levels(*given: str) -> list[Level]:
        return [Level(number, "title", status) for number, status in enumerate(given, 1)]

    assert verdict(levels(PASSED, DIFFERENT, NOT_RUN)) == DIFFERENT
    assert verdict(levels(PASSED, NOT_RUN)) == PASSED
    assert verdict(levels(NOT_RUN)) == NOT_RUN


def test_a_report_of_damaged_tokens_can_be_read(growing, tmp_path):
    tokens = compare_tokens(growing, decoder(static=True, nan=np.nan), Letters(), TEXT, TensorProto.FLOAT)
    report = make_report("damaged", [Level(5, "Tokens", DIFFERENT, tokens=tokens)], {}, 0.0)
    write_report(report, tmp_path)
    again = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert render(again) == (tmp_path / "report.html").read_text()
    assert "not a number" in render(again)


def test_text_in_the_report_is_escaped(growing, static):
    tokens = compare_tokens(growing, static, Letters(), TEXT, TensorProto.FLOAT)
    tokens.continuation.example["prompt"] = "<script>alert(1)</script>"
    html = render(make_report("<b>", [Level(5, "Tokens", PASSED, tokens=tokens)], {}, 0.0))
    assert "<script>" not in html
    assert "<b>" not in html.split("</title>")[0]


@pytest.mark.parametrize(
    ("output", "said", "unsaid"), [("logits", "worst cache", "worst output"), ("y", "worst output", "worst cache")]
)
def test_a_part_without_caches_has_outputs(output, said, unsaid):
    scenario = ScenarioResult("random inputs", "x 2", PASSED, outputs=[OutputError(output, 1e-7, 0, None)])
    html = render(make_report("part", [Level(1, "Graphs", PASSED, comparison=Comparison("a", "b", 1e-5, [scenario]))], {}, 0.0))
    assert said in html
    assert unsaid not in html

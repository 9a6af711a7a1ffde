"""What a stage wrote, and the next cannot use, is a check that failed; what a machine cannot do was not run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import network_graphs as graphs
import numpy as np
import onnx
import pytest
from decoder_graphs import decoder_graph
from onnx import helper

from suture.core.manifest import read_manifest
from suture.core.network.parse import NO_TENSORRT
from suture.validate import levels as validate_levels
from suture.validate import plots
from suture.validate.compare import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.validate.options import ValidateOptions
from suture.validate.stage import validate_pipeline

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
LOWERED, PORTABLE, EXPORTED = "surgery/model.trt.onnx", "surgery/model.onnx", "export/model.onnx"


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    damage: Callable[[Path], None]
    levels: tuple[int, ...]  # that fail


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text("no graph", encoding="utf-8")


def lost(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_logits(path: Path) -> None:
    edit(path, lambda model: model.graph.output.pop(0))


def without_nodes(path: Path) -> None:
    edit(path, lambda model: model.graph.ClearField("node"))


def without_a_cache(path: Path) -> None:
    edit(path, lambda model: model.graph.output.pop())


def without_weights(path: Path) -> None:
    def outside(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="gone.data")

    edit(path, outside)


def refused(path: Path) -> None:
    """An operator that nobody has."""
    edit(path, lambda model: model.graph.node.append(helper.make_node("NoSuchOperator", ["input_ids"], ["nothing"])))


def dangling(path: Path) -> None:
    """A node reads what none writes."""

    def cut(model: onnx.ModelProto) -> None:
        model.graph.node[len(model.graph.node) // 2].input[0] = "nowhere"

    edit(path, cut)


def deadly(path: Path) -> None:
    """TensorRT's parser dies of it."""
    model = onnx.parser.parse_model("""<ir_version: 11, opset_import: ["" : 24]>
    g (float x) => (float y) { y = Attention(x, x, x) }""")
    onnx.save(model, path)


def edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


LEVELS = {LOWERED: (3,), PORTABLE: (2, 3, 4, 5), EXPORTED: (1, 2)}
DAMAGE = (empty, half, text, lost, folder, without_logits, without_nodes, without_a_cache, without_weights, refused, dangling)
SOME = (empty, lost, without_logits, refused)
IN_SUITE = {LOWERED: SOME, PORTABLE: (without_logits, refused), EXPORTED: (empty, lost)}
CASES = [
    pytest.param(
        Case(damage.__name__, file, damage, LEVELS[file]), marks=[] if damage in IN_SUITE[file] else [pytest.mark.slow]
    )
    for file in LEVELS for damage in (DAMAGE if file == LOWERED else SOME)
]  # fmt: skip
CASES += [Case("deadly", LOWERED, deadly, (3,)), Case("deadly", PORTABLE, deadly, (2, 3, 4, 5))]


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """What export and surgery leave: three graphs over the same weights, listed in manifests."""
    portable = graphs.portable("float")
    models = {EXPORTED: portable, PORTABLE: portable, LOWERED: graphs.lowered("float")}
    for name, model in models.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        onnx.save(model, tmp_path / name)
    for stage in ("export", "surgery"):
        outputs = {path.name: path.stat().st_size for path in (tmp_path / stage).iterdir()}
        said = {"outputs": outputs, "options": {}, "seconds": 1.0, "peak_memory_bytes": 1}
        (tmp_path / stage / "manifest.json").write_text(json.dumps(said), encoding="utf-8")
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Which take longer to draw than these small graphs to compare."""
    monkeypatch.setattr(plots, "_svg", lambda *_: "")


def report_of(pipeline: Path) -> dict:
    return json.loads((pipeline / "validate" / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_whole_arrows_pass(pipeline):
    assert validate_pipeline(pipeline, ValidateOptions()) == 0
    assert [level["status"] for level in report_of(pipeline)["levels"]] == [NOT_RUN, PASSED, PASSED, NOT_RUN, NOT_RUN]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}-{case.name}")
def test_a_broken_arrow_fails(case, pipeline, capsys):
    case.damage(pipeline / case.file)
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    report = report_of(pipeline)
    assert report["verdict"] == FAILED
    levels = {level["number"]: level for level in report["levels"]}
    assert {number for number, level in levels.items() if level["status"] == FAILED} == set(case.levels)
    assert all(str(pipeline / case.file.split("/")[0]) in levels[number]["reason"] for number in case.levels)
    html = (pipeline / "validate" / "report.html").read_text(encoding="utf-8")
    assert html.count('<span class="pill failed">') >= len(case.levels)
    capsys.readouterr()
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    assert "up to date, failed" in capsys.readouterr().out


def test_an_edited_verdict_is_not_believed(pipeline, capsys):
    """The verdict that counts is the manifest's; report.json is for people."""
    empty(pipeline / LOWERED)
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    report = pipeline / "validate" / "report.json"
    report.write_text(report.read_text(encoding="utf-8").replace(FAILED, PASSED), encoding="utf-8")
    assert validate_pipeline(pipeline, ValidateOptions()) == 1


def test_a_machine_without_tensorrt_has_not_run_it(pipeline, monkeypatch):
    def absent(*_):
        raise NO_TENSORRT

    monkeypatch.setattr(validate_levels, "open_network", absent)
    assert validate_pipeline(pipeline, ValidateOptions()) == 0
    level = report_of(pipeline)["levels"][2]
    assert level["status"] == NOT_RUN
    assert "is not installed" in level["reason"]


@pytest.mark.parametrize(
    ("described", "engine"),
    [('{"engine_bytes": 4, "signature": ', b"1234"), (None, b"1234"),
     pytest.param("[]", b"1234", marks=pytest.mark.slow), pytest.param("{}", b"1234", marks=pytest.mark.slow),
     ('{"engine_bytes": 5, "tensorrt": {"flavour": "rtx"}, "signature": null}', b"1234")],
)  # fmt: skip
@pytest.mark.sample(1)
def test_an_engine_that_is_none_fails(described, engine, pipeline):
    (pipeline / "build").mkdir()
    (pipeline / "build" / "model.engine").write_bytes(engine)
    if described is not None:
        (pipeline / "build" / "engine.json").write_text(described, encoding="utf-8")
    assert validate_pipeline(pipeline, ValidateOptions()) == 1
    level = report_of(pipeline)["levels"][3]
    assert level["status"] == FAILED
    assert "build" in level["reason"]


@pytest.mark.parametrize(
    ("value", "sides"), [(np.nan, "both"), (np.nan, "reference"), (np.inf, "both"), (-np.inf, "candidate")]
)
@pytest.mark.sample("nan-both", "-inf-candidate")
def test_what_is_not_finite_differs(value, sides, tmp_path):
    """On both sides, too: two graphs that compute nothing do not agree on it."""
    for name, static in ((EXPORTED, False), (PORTABLE, True)):
        (tmp_path / name).parent.mkdir()
        damaged = sides == "both" or static == (sides == "candidate")
        onnx.save(decoder_graph(static, nan=value) if damaged else decoder_graph(static), tmp_path / name)
    assert validate_pipeline(tmp_path, ValidateOptions()) == 1
    assert report_of(tmp_path)["levels"][1]["status"] == DIFFERENT
    html = (tmp_path / "validate" / "report.html").read_text(encoding="utf-8")
    assert "not a number" in html or "infinite" in html


def test_the_manifest_says_what_the_report_does(pipeline):
    half(pipeline / LOWERED)
    validate_pipeline(pipeline, ValidateOptions())
    assert read_manifest(pipeline / "validate")["verdict"] == FAILED

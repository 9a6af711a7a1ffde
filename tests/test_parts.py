"""Models of several parts: where their results lie, and what stays true when a folder gets another model."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import CONFIG, export, traced
from families import CAPACITY, operated
from families import checkpoint as family
from processes import pipeline
from stored_traces import stored_trace

from suture.core.errors import UserError
from suture.core.manifest import read_manifest
from suture.core.parts import find_parts
from suture.export import stage as export_stage
from suture.generate.opening import find_files, open_model
from suture.models.families.qwen import Qwen
from suture.models.parts import DECODER, Part
from suture.runtime.graphs import open_embedding, open_graph
from suture.surgery.__main__ import main as surgery
from suture.validate.options import ValidateOptions
from suture.validate.pipeline import find_pipeline
from suture.validate.stage import validate_pipeline


@pytest.fixture
def qwen(checkpoint) -> Path:
    return checkpoint


@pytest.fixture(autouse=True)
def traced_before(exported, monkeypatch):
    """Both models' graphs, and that of Qwen's embedding, which its part alone has, as they were traced before."""
    trace_graph = export_stage.trace_graph

    def trace(module, dtype):
        return traced(exported, dtype) if isinstance(module, Qwen) else stored_trace("whisper", "float32", "decoder")

    def trace_part(part, dtype):
        return stored_trace("whisper", "float32", "encoder") if part.name == "encoder" else trace_graph(part, dtype)

    monkeypatch.setattr(export_stage, "trace", trace)
    monkeypatch.setattr(export_stage, "trace_graph", trace_part)


@pytest.fixture
def embedding(monkeypatch) -> None:
    """Qwen's family as one whose decoder takes embeddings."""
    part = lambda model: (Part("decoder", DECODER, model, takes_embeddings=True),)  # noqa: E731
    monkeypatch.setattr(Qwen, "parts", part, raising=False)


def names(out: Path) -> list[str]:
    return [part.name for part in find_parts(out)]


def test_whispers_parts_lie_beside_each_other(shared, tmp_path):
    export(family("whisper", shared), tmp_path)
    encoder, decoder = find_parts(tmp_path)
    assert [(part.name, part.kind, part.folder) for part in (encoder, decoder)] == [
        ("encoder", "graph", tmp_path / "encoder"),
        ("decoder", "decoder", tmp_path / "decoder"),
    ]
    assert encoder.inputs == {"input_features": {"shape": ["batch", 8, 24], "dtype": "FLOAT"}}
    crossed = {name: described["from"] for name, described in decoder.inputs.items() if "from" in described}
    assert crossed == {f"past_key_values.{i}.encoder.{kind}": f"encoder/present.{i}.encoder.{kind}"
                       for i in (0, 1) for kind in ("key", "value")}  # fmt: skip
    assert {source.partition("/")[2] for source in crossed.values()} == set(encoder.outputs)
    for part in (encoder, decoder):
        graph = onnx.load(part.folder / "export" / "model.onnx", load_external_data=False).graph
        assert [value.name for value in graph.input] == list(part.inputs)
        assert read_manifest(part.folder / "export")["stage"] == "export"
    assert not (tmp_path / "export").exists()
    assert read_manifest(tmp_path)["outputs"].keys() == {"parts.json"}


def test_a_part_alone(shared, tmp_path):
    export(family("whisper", shared), tmp_path, part="encoder", pipeline=True)
    (part,) = find_parts(tmp_path)
    assert (part.name, part.kind, part.folder) == ("encoder", "graph", tmp_path)
    with pytest.raises(UserError, match="--part vision: no such part; choose from encoder, decoder"):
        export(family("whisper", shared), tmp_path, part="vision")


def test_a_second_export_writes_nothing(shared, tmp_path, capsys):
    export(family("whisper", shared), tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    export(family("whisper", shared), tmp_path)
    assert capsys.readouterr().out.count("up to date") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written


def test_another_model_in_the_folder_leaves_no_part_of_the_one_before(shared, qwen, tmp_path, embedding, monkeypatch):
    export(family("whisper", shared), tmp_path)
    export(qwen, tmp_path)
    assert names(tmp_path) == ["embed", "decoder"]
    assert not (tmp_path / "encoder" / "export").exists()
    monkeypatch.delattr(Qwen, "parts")
    export(qwen, tmp_path, pipeline=True)
    (part,) = find_parts(tmp_path)
    assert part.folder == tmp_path
    assert not (tmp_path / "parts.json").exists()


def test_nobody_takes_parts_of_two_models(shared, qwen, tmp_path, embedding, monkeypatch):
    """Killed between two parts: no list of them says that they belong together."""
    export(family("whisper", shared), tmp_path)
    monkeypatch.setattr("suture.export.stage.trace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(qwen, tmp_path)
    assert not (tmp_path / "parts.json").exists()
    with pytest.raises(UserError, match=r"has no export/model\.onnx"):
        find_pipeline(tmp_path, None)


@pytest.mark.parametrize(
    "parts",
    [None, [], ["decoder"], [{"name": "../x", "kind": "graph", "inputs": {}, "outputs": {}}],
     [{"name": "a", "kind": "other", "inputs": {}, "outputs": {}}], [{"name": "a", "kind": "graph", "inputs": 3, "outputs": {}}],
     [{"name": "a", "kind": "graph", "inputs": {}, "outputs": {}}] * 2],
)  # fmt: skip
def test_a_list_of_parts_that_is_none_is_refused(parts, tmp_path):
    (tmp_path / "parts.json").write_text(json.dumps({"parts": parts}))
    with pytest.raises(UserError, match=r"parts\.json: (describes no part|does not list the parts) of a model"):
        find_parts(tmp_path)


def test_a_file_that_export_did_not_write_stays(shared, tmp_path):
    (tmp_path / "parts.json").write_text("mine")
    with pytest.raises(UserError, match=r"parts\.json: was not written by export\.parts and would be replaced"):
        export(family("whisper", shared), tmp_path)
    assert (tmp_path / "parts.json").read_text() == "mine"


def test_embeddings_are_a_part_of_their_own(qwen, tmp_path, embedding):
    """By reference to the checkpoint's table, and through every level; tokens as those of the model in one part."""
    export(qwen, tmp_path, weights="reference")
    embed, decoder = find_parts(tmp_path)
    assert embed.inputs == {"input_ids": {"shape": ["batch", "sequence"], "dtype": "INT64", "below": CONFIG["vocab_size"]}}
    assert embed.outputs == {"inputs_embeds": {"shape": ["batch", "sequence", 64], "dtype": "FLOAT"}}
    assert decoder.source("inputs_embeds") == "embed"
    assert "input_ids" not in decoder.inputs
    table = onnx.load(embed.folder / "export" / "model.onnx", load_external_data=False).graph.initializer
    assert [tensor.name for tensor in table] == ["transformer.wte.weight"]
    assert table[0].data_location == onnx.TensorProto.EXTERNAL
    assert not list(tmp_path.rglob("*.safetensors"))
    for part in (embed, decoder):
        capacity = ["--capacity", "64"] if part is decoder else []
        assert (
            surgery([str(part.folder / "export" / "model.onnx"), "--out", str(part.folder / "surgery"), "--verify", *capacity])
            == 0
        )
    assert validate_pipeline(tmp_path, ValidateOptions()) == 0
    report = json.loads((tmp_path / "validate" / "report.json").read_text())
    found = {level["title"]: level["status"] for level in report["levels"]}
    assert [status for title, status in found.items() if "engine" not in title and "text" not in title] == ["passed"] * 6
    assert found["embed: Portable graph ↔ TensorRT's network"] == "passed"
    assert [part["name"] for part in report["parts"]] == ["embed", "decoder"]
    assert {"surgery of embed", "surgery of decoder"} <= {stage["name"] for stage in report["stages"]}
    assert "Surgery of decoder" in (tmp_path / "validate" / "report.html").read_text()


def test_generating_embeds_tokens(qwen, tmp_path, embedding, monkeypatch):
    export(qwen, tmp_path / "apart")
    monkeypatch.delattr(Qwen, "parts")
    export(qwen, tmp_path / "whole" / "export")
    ids, counts, alpha = np.array([[5, 3, 8, 1]]), np.array([4]), np.ones(1, np.float32)
    steps = []
    for out in ("apart", "whole"):
        model = open_model(find_files(tmp_path / out, qwen), "cpu").model
        steps.append(model.decoder(1, noise=False).step(ids, counts, alpha))
    np.testing.assert_allclose(*steps, atol=1e-5)
    made_up = open_graph(tmp_path / "apart" / "decoder" / "export" / "model.onnx")
    assert np.abs(made_up.decoder(1).step(ids, counts, alpha) - steps[1]).max() > 1e-2
    lookup = open_embedding(tmp_path / "apart" / "embed" / "export" / "model.onnx")
    assert lookup(ids).shape == (1, 4, 64)


@pytest.mark.slow
def test_the_pipeline_takes_every_part_through_every_stage(shared, tmp_path):
    out = tmp_path / "out"
    for part in find_parts(operated("whisper", "float32", shared)):
        shutil.copytree(part.folder / "export", out / part.name / "export")
    shutil.copy(operated("whisper", "float32", shared) / "parts.json", out)
    shutil.copy(operated("whisper", "float32", shared) / "manifest.json", out)
    done = pipeline("--checkpoint", family("whisper", shared), "--out", out, "--dtype", "float32", "--capacity", CAPACITY,
                    "--compute-capability", "8.9")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("peak memory") :]
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert [row for row in rows if row] == [
        "export",
        "surgery of encoder",
        "surgery of decoder",
        "build of encoder",
        "build of decoder",
        "validate",
    ]
    for part in ("encoder", "decoder"):
        assert (out / part / "build" / "model.engine").stat().st_size > 0
    levels = json.loads((out / "validate" / "report.json").read_text())["levels"]
    assert [level["title"].partition(":")[0] for level in levels[:8]] == ["encoder"] * 4 + ["decoder"] * 4
    assert [level["number"] for level in levels] == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert [level["status"] for level in levels if level["number"] < 4] == ["passed"] * 6

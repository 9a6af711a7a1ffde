"""UniAD's parts mean the same after each step of the pipeline, and so does a drive through all of them."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from families import CAPABILITIES, build, export_and_operate, levels

from suture.core.driving import BEV_ENCODER, PARTS
from suture.core.network.parse import describe
from suture.core.weights import weights_root
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models.named import checkpoint_folder
from suture.surgery import __main__ as surgery
from suture.validate.driving import driving_level
from suture.validate.pipeline import find_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = checkpoint_folder("tiny-uniad")


def operated(name: str, dtype: str, out: Path) -> Path:
    """One part, exported and operated on."""
    export(out / "export", ExportOptions(checkpoint=TINY, dtype=dtype, part=name))
    surgery.main([str(out / "export" / "model.onnx"), "--out", str(out / "surgery")])
    return out


def check_part(out: Path) -> dict:
    """Levels 1 to 3, no plugin in what the parser makes of it, and an engine for all GPUs: engine.json."""
    assert [level["status"] for level in levels(out)] == ["passed"] * 3
    lowered = out / "surgery" / "model.trt.onnx"
    kinds = {layer.type for layer in describe(lowered.read_bytes(), lowered, weights_root(lowered)).layers}
    assert not [kind for kind in kinds if kind.startswith("PLUGIN")]
    engine = build(lowered.parent, "--compute-capability", *CAPABILITIES.split())
    assert engine["compute_capabilities"] == CAPABILITIES.split()
    return engine


@pytest.mark.slow
def test_the_encoder_means_the_same_after_each_step(tmp_path):
    """Nearest and linear sampling, gathers of cameras' cells, two kinds of deformable attention."""
    check_part(operated(BEV_ENCODER, "float16", tmp_path))


@pytest.mark.every
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", PARTS)
def test_each_part_means_the_same_after_each_step(name, dtype, tmp_path, record_property):
    engine = check_part(operated(name, dtype, tmp_path))
    record_property("kernels", engine["profiles"][0]["kernels"])


@pytest.mark.every
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_drive_is_the_same_and_with_a_damaged_graph_is_not(dtype, tmp_path):
    """The encoder's portable graph, damaged, forgets how far the vehicle has come."""
    export_and_operate(TINY, tmp_path, dtype)
    pipeline = find_pipeline(tmp_path, None)
    level = driving_level(pipeline, 0)
    assert level.status == "passed", level.drive
    assert level.drive.objects > 10
    (files,) = (each for each in pipeline.parts if each.part.name == BEV_ENCODER)
    graph = onnx.load(files.portable)
    changed = [node for node in graph.graph.node if node.op_type == "Sin"]
    assert changed
    for node in changed:
        node.op_type = "Cos"
    path = tmp_path / "damaged.onnx"
    onnx.save(graph, path)
    parts = tuple(replace(each, portable=path) if each is files else each for each in pipeline.parts)
    assert driving_level(replace(pipeline, parts=parts), 0).status == "different"

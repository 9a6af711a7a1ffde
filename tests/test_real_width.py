"""Two layers of each model at its real width, heads and vocabulary, in float32, one model after another: all that surgery
fuses, levels 1 to 3 layer by layer from mapped files, and an engine whose weights are inputs. Random values."""

import shutil

import pytest

from suture.core import layerwise
from suture.models.named import PRESETS, decoders, read_config
from suture.models.random_weights import write
from suture.validate import reference
from suture.validate.compare import PASSED
from tests.families import build, export_and_operate, levels, surgered, worst

CAPABILITY = "8.9"


@pytest.fixture
def folder(tmp_path):
    """Gigabytes, which go with the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.every
@pytest.mark.parametrize("preset", decoders())
def test_two_layers_at_real_width(preset, folder, monkeypatch, record_property):
    for module in (layerwise, reference):
        monkeypatch.setattr(module, "LARGE", 0)
    config = read_config(PRESETS / f"{preset}.json", layers=2)
    size, _ = write(config, folder / "checkpoint", "float32", seed=0)
    export_and_operate(folder / "checkpoint", folder / "out", "float32", weights="reference")
    found = levels(folder / "out")
    assert [level["status"] for level in found] == [PASSED] * len(found)
    assert len(found) in (3, 6, 9)
    for surgery in surgered(folder / "out"):
        build(surgery, "--compute-capability", CAPABILITY, "--weights", "input")
    record_property("bytes", size)
    record_property("compute capability", CAPABILITY)
    for level, error in worst(found).items():
        record_property(level, error)

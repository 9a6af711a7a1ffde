"""Presets are the models that they are named after: parameters as many as their makers say, of a supported family."""

import json
from pathlib import Path

import pytest

from suture.models.architectures import architecture
from suture.models.named import PRESETS, presets, read_config

PUBLISHED = json.loads(Path(__file__).with_name("presets.json").read_text())
UNITS = {"B": 1e9, "M": 1e6}


def test_every_preset_has_a_source():
    assert PUBLISHED.keys() == set(presets())
    assert all(found["source"].startswith("https://") for found in PUBLISHED.values())


@pytest.mark.parametrize("preset", presets())
def test_a_preset_has_the_parameters_that_were_published(preset, record_property):
    """Up to one of the last digit that was published, or to 1 %: Whisper's makers round more than they show."""
    path = PRESETS / f"{preset}.json"
    counted = sum(tensor.numel() for tensor in architecture(read_config(path), path).state_dict().values())
    number, unit = PUBLISHED[preset]["parameters"].split()
    last = 10 ** -len(number.partition(".")[2]) * UNITS[unit]
    assert abs(counted - float(number) * UNITS[unit]) <= max(last, 0.01 * counted)
    record_property("counted", counted)
    record_property("parameters", f"{counted / 1e9:.2f} B")

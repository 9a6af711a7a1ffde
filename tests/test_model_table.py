"""The table of models: made of what tests found, and of nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import COMMAND, COVERS, DETAILS, LEVELS, RESULTS, TESTS, documents, read, rows, table
from benchmarks.tables import FAMILIES as PAGE
from benchmarks.tables import put
from suture.core.errors import UserError
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
STORED = json.loads(RESULTS.read_text())


def test_the_tables_are_what_the_results_say():
    assert put(PAGE.read_text(), COMMAND, table(STORED)) == PAGE.read_text()
    assert documents(STORED) == DETAILS.read_text()


def test_every_family_has_a_row():
    assert set(rows(STORED)) <= FAMILIES.keys()
    assert COVERS.keys() <= FAMILIES.keys()


def test_a_family_needs_no_line_but_its_own(monkeypatch):
    """In tests/families.py: its row comes when its tests have run."""
    monkeypatch.setitem(FAMILIES, "another", FAMILIES["gpt2"])
    assert "another" not in rows(STORED)
    found = {name.replace("[gpt2", "[another"): each for name, each in STORED.items() if "[gpt2" in name}
    assert rows(STORED | found)[-1] == "another"
    assert "| [another](../tests/test_models.py) | GPT2LMHeadModel | – | " in table(STORED | found)


def test_results_are_of_tests_that_there_are():
    for name in STORED:
        file, function = name.partition("[")[0].split("::")
        assert file in TESTS
        assert f"def {function}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("outcome", ["failure", "skipped", None])
def test_no_row_without_its_test(outcome):
    test = LEVELS.format("gpt2", "float32")
    others = {name: found for name, found in STORED.items() if name != test}
    with pytest.raises(UserError, match=r"agrees\[gpt2-float32\]: " + (outcome or "not run")):
        table(others if outcome is None else others | {test: {"outcome": outcome}})


def test_what_pytest_writes_is_read(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('level 1', '2e-7')\n"
        "def test_bad(record_property):\n    record_property('level 1', '2e-7')\n    assert False\n"
        "def test_left_out(): pytest.skip('why not')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", "found.xml", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = read(tmp_path / "found.xml")
    assert found == {
        "test_some.py::test_good": {"outcome": "passed", "seconds": 0, "level 1": "2e-7"},
        "test_some.py::test_bad": {"outcome": "failure", "seconds": 0, "level 1": "2e-7"},
        "test_some.py::test_left_out": {"outcome": "skipped", "seconds": 0},
    }
    with pytest.raises(UserError, match="is not a run of pytest"):
        read(tmp_path / "test_some.py")

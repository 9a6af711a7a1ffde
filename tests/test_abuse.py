"""Hostile and faulty input to every stage: the tables in tests/abuse, and damage drawn at random."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.abuse.case import FINISHED, NO_TRACE, Case
from tests.abuse.coverage import LEAST, OF
from tests.abuse.flips import FLIPPED
from tests.abuse.server import WEAK, Server
from tests.abuse.sources import Sources
from tests.abuse.tables import cases, chosen

ALL = cases()
CHOSEN = chosen(ALL)


@pytest.fixture(scope="session")
def sources(shared):
    """The good inputs, and the process that runs stages on copies of them."""
    server = Server()
    yield Sources(shared, server)
    server.close()


def check(case: Case, sources: Sources, work: Path) -> None:
    broken, result = sources.run(case, work)
    assert not broken, f"{'; '.join(broken)}\n{result.out}\n{result.err}"
    shutil.rmtree(work)


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.id, marks=[] if case.id in CHOSEN else [pytest.mark.slow]) for case in ALL
])  # fmt: skip
def test_abuse(case, sources, tmp_path):
    check(case, sources, tmp_path / "work")


def test_each_stage_has_twenty_cases_of_each_kind_that_it_meets():
    counts = Counter((case.kind, case.stage) for case in ALL)
    met = {(kind, stage) for kind, (stages, _) in OF.items() for stage in stages}
    assert {pair: counts[pair] for pair in met if counts[pair] < LEAST} == {}
    assert counts.keys() == met, "a case, or a stage, that the matrix does not know"


@pytest.mark.parametrize("stage", ["surgery", "generate", "generate.picture", "generate.mask", "convert.like"])
def test_good_inputs_are_taken(stage, sources, tmp_path):
    """Else no case would say anything."""
    check(Case(0, stage, "good", "good input is taken", lambda folder: None, expected=(0,)), sources, tmp_path / "work")


WEAKENED = {  # by the mechanism that does nothing: a case that must see it
    "suture.core.tensors:inside": "1-surgery-another_model's_safetensors_in_initializer",
    "suture.core.weights:check_outside": "1-surgery-the_folder_above_as_weights_root",
    "suture.core.stage:Stage._check_folder": "2-surgery-results_of_build",
    "suture.generate.command:check_results": "2-generate-prompts",
    "suture.core.identity:Contents._hash": "3-surgery-weights_flipped_at_0.5",
    "suture.core.arguments:_within": "5-surgery---capacity_'0'",
    "suture.core.stage:remove": "9-surgery-model.ort.onnx_of_a_run_before",
    "suture.core.weights:check_model": "13-surgery-cycle",
    "suture.surgery.operate:check_loads": "13-surgery-no_such_operator_of_onnxruntime's",
}


@pytest.mark.parametrize("mechanism", WEAKENED)
def test_the_table_sees_a_mechanism_that_does_nothing(mechanism, sources, tmp_path):
    assert mechanism in WEAK  # what the server cannot weaken ends it, which is no answer of the case's
    case = next(case for case in ALL if case.id == WEAKENED[mechanism])
    broken, said = sources.run(replace(case, fault=(mechanism, "WEAK"), seconds=20), tmp_path / "work")
    assert broken
    assert "hung for 20 s" not in broken, said


PLACES = [(stage, name) for stage, names in FLIPPED.items() for name in names]


@pytest.mark.parametrize(("stage", "name"), PLACES)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_are_flipped(stage, name, data, sources, tmp_path_factory):
    """Any outcome but a traceback, a hang or a change outside --out: a flipped bit of a weight is not a fault."""
    finished = name.startswith("out/")
    size = ((sources.finished if finished else sources.good)(stage) / name).stat().st_size
    flips = data.draw(st.lists(st.tuples(st.integers(0, min(size, 20_000) - 1), st.integers(1, 255)), min_size=1, max_size=4))

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        for place, value in flips:
            content[place] ^= value
        (folder / name).write_bytes(content)

    fault = NO_TRACE if stage == "export" else None
    case = Case(0, stage, "flipped", "no traceback, no hang", damage, expected=(0, 1, 2), seconds=120, fault=fault,
                more=FINISHED.get(stage, ()), finished=finished)  # fmt: skip
    check(case, sources, tmp_path_factory.mktemp("flipped") / "work")

"""Hostile and faulty input to every stage: the tables in tests/abuse, and damage drawn at random."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.abuse import good, good_pictures
from tests.abuse.case import FINISHED, NO_TRACE, PICTURED, Case, broken_promises, contents
from tests.abuse.coverage import LEAST, OF
from tests.abuse.flips import FLIPPED
from tests.abuse.server import WEAK, Server
from tests.abuse.tables import cases, chosen

ALL = cases()
CHOSEN = chosen(ALL)


@pytest.fixture(scope="session")
def inputs(shared):
    """The good inputs."""
    return made_once(shared / "abuse", good.make, "library")


@pytest.fixture(scope="session")
def pictured(shared):
    """Those of the stages that read or write pictures."""
    return made_once(shared / "abuse-pictures", good_pictures.make, "out")


def made_once(folder: Path, make: Callable[[Path], None], last: str) -> Path:
    """The folder, filled by `make`, of which the folder `last` comes last, unless another worker has done so."""
    with FileLock(f"{folder}.lock"):
        if not (folder / last).is_dir():
            folder.mkdir(exist_ok=True)
            make(folder)
    return folder


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(inputs, server, shared):
    """The good inputs with a stage's results in `out`."""

    def run(stage: str):
        folder = shared / f"abuse-{stage}"
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                shutil.copytree(inputs, folder)
                fault = NO_TRACE if stage == "export" else None
                good_case = Case(0, stage, "good", "", lambda folder: None, more=FINISHED.get(stage, ()), fault=fault)
                result = server.run(good_case, folder)
                assert result.status == 0, result.err
        return folder

    return run


def problems(case: Case, inputs, server, work) -> tuple[list[str], str]:
    """What the case shows to be broken, and what the stage said."""
    shutil.copytree(inputs, work, symlinks=True)
    case.damage(work)
    before = contents(work)
    result = server.run(case, work)
    broken = broken_promises(case, result, before, contents(work))
    if wrong := case.after(work):
        broken.append(wrong)
    return broken, f"{result.out}\n{result.err}"


def check(case: Case, inputs, server, work) -> None:
    broken, said = problems(case, inputs, server, work)
    assert not broken, f"{'; '.join(broken)}\n{said}"
    shutil.rmtree(work)


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.id, marks=[] if case.id in CHOSEN else [pytest.mark.slow]) for case in ALL
])  # fmt: skip
def test_abuse(case, request, server, finished, tmp_path):
    good_ones = "pictured" if case.stage in PICTURED else "inputs"
    source = finished(case.stage) if case.finished else request.getfixturevalue(good_ones)
    check(case, source, server, tmp_path / "work")


def test_each_stage_has_twenty_cases_of_each_kind_that_it_meets():
    counts = Counter((case.kind, case.stage) for case in ALL)
    met = {(kind, stage) for kind, (stages, _) in OF.items() for stage in stages}
    assert {pair: counts[pair] for pair in met if counts[pair] < LEAST} == {}
    assert counts.keys() == met, "a case, or a stage, that the matrix does not know"


@pytest.mark.parametrize("stage", ["surgery", "generate", "generate.picture", "generate.mask", "convert.like"])
def test_good_inputs_are_taken(stage, request, server, tmp_path):
    """Else no case would say anything."""
    source = request.getfixturevalue("pictured" if stage in PICTURED else "inputs")
    check(Case(0, stage, "good", "good input is taken", lambda folder: None, expected=(0,)), source, server, tmp_path / "work")


WEAKENED = {  # by the mechanism that does nothing: a case that must see it
    "suture.core.tensors:inside": "1-surgery-a_folder_above_in_initializer",
    "suture.core.stage:Stage._check_folder": "2-surgery-results_of_build",
    "suture.generate.command:check_results": "2-generate-prompts",
    "suture.core.identity:Contents._hash": "3-surgery-weights_flipped_at_0.5",
    "suture.core.arguments:_within": "5-surgery---capacity_'0'",
    "suture.core.stage:remove": "9-surgery-model.ort.onnx_of_a_run_before",
    "suture.core.weights:check_model": "13-surgery-cycle",
    "suture.surgery.operate:check_loads": "13-surgery-no_such_operator_of_onnxruntime's",
}


@pytest.mark.parametrize("mechanism", WEAKENED)
def test_the_table_sees_a_mechanism_that_does_nothing(mechanism, inputs, server, finished, tmp_path):
    assert mechanism in WEAK  # what the server cannot weaken ends it, which is no answer of the case's
    case = next(case for case in ALL if case.id == WEAKENED[mechanism])
    weakened = replace(case, fault=(mechanism, "WEAK"), seconds=20)
    broken, said = problems(weakened, finished(case.stage) if case.finished else inputs, server, tmp_path / "work")
    assert broken
    assert "hung for 20 s" not in broken, said


PLACES = [(stage, name) for stage, names in FLIPPED.items() for name in names]


@pytest.mark.parametrize(("stage", "name"), PLACES)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_are_flipped(stage, name, data, inputs, server, finished, tmp_path_factory):
    """Any outcome but a traceback, a hang or a change outside --out: a flipped bit of a weight is not a fault."""
    source = finished(stage) if name.startswith("out/") else inputs
    size = (source / name).stat().st_size
    flips = data.draw(st.lists(st.tuples(st.integers(0, min(size, 20_000) - 1), st.integers(1, 255)), min_size=1, max_size=4))

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        for place, value in flips:
            content[place] ^= value
        (folder / name).write_bytes(content)

    fault = NO_TRACE if stage == "export" else None
    case = Case(0, stage, "flipped", "no traceback, no hang", damage, expected=(0, 1, 2), seconds=120, fault=fault,
                more=FINISHED.get(stage, ()))  # fmt: skip
    check(case, source, server, tmp_path_factory.mktemp("flipped") / "work")

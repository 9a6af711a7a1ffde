"""Hostile and faulty input to every stage: the tables in tests/abuse, and damage drawn at random."""

import shutil

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.abuse import good
from tests.abuse.case import Case, broken_promises, contents
from tests.abuse.server import Server
from tests.abuse.tables import cases, chosen

ALL = cases()
CHOSEN = chosen(ALL)


@pytest.fixture(scope="session")
def inputs(shared):
    """The good inputs."""
    folder = shared / "abuse"
    with FileLock(f"{folder}.lock"):
        if not (folder / "library").is_dir():
            folder.mkdir(exist_ok=True)
            good.make(folder)
    return folder


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()


def check(case: Case, inputs, server, work) -> None:
    shutil.copytree(inputs, work)
    case.damage(work)
    before = contents(work)
    result = server.run(case, work)
    broken = broken_promises(case, result, before, contents(work))
    assert not broken, f"{'; '.join(broken)}\n{result.err}"


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.id, marks=[] if case.id in CHOSEN else [pytest.mark.slow]) for case in ALL
])  # fmt: skip
def test_abuse(case, inputs, server, tmp_path):
    check(case, inputs, server, tmp_path / "work")


@pytest.mark.parametrize("stage", ["surgery", "generate"])
def test_good_inputs_are_taken(stage, inputs, server, tmp_path):
    """Else no case would say anything."""
    check(Case(0, stage, "good", "good input is taken", lambda folder: None, expected=(0,)), inputs, server, tmp_path / "work")


DAMAGED = {
    "export": ("checkpoint/config.json", "checkpoint/model.safetensors"),
    "surgery": ("graphs/model.onnx",),
    "validate": ("graphs/model.onnx",),
    "generate": (
        "library/tokenizer.json",
        "library/tokenizer_config.json",
        "library/generation_config.json",
        "graphs/model.onnx",
    ),
}
PLACES = [(stage, name) for stage, names in DAMAGED.items() for name in names]


@pytest.mark.parametrize(("stage", "name"), PLACES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_are_flipped(stage, name, data, inputs, server, tmp_path_factory):
    """Any outcome but a traceback, a hang or a change outside --out: a flipped bit of a weight is no fault."""
    size = (inputs / name).stat().st_size
    flips = data.draw(st.lists(st.tuples(st.integers(0, min(size, 20_000) - 1), st.integers(1, 255)), min_size=1, max_size=4))

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        for place, value in flips:
            content[place] ^= value
        (folder / name).write_bytes(content)

    case = Case(0, stage, "flipped", "no traceback, no hang", damage, expected=(0, 1, 2), seconds=120)
    check(case, inputs, server, tmp_path_factory.mktemp("flipped") / "work")

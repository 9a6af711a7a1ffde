"""All cases, a module a kind."""

from importlib import import_module
from pathlib import Path

from tests.abuse.case import Case

CHOSEN = 1  # of each kind and stage, that runs in the suite: the rest with -m slow


def cases() -> list[Case]:
    found = sorted(path.stem for path in Path(__file__).parent.glob("kind_*.py"))
    listed = [case for name in found for case in import_module(f"tests.abuse.{name}").CASES]
    assert len({case.id for case in listed}) == len(listed), "two cases of one name"
    return listed


def chosen(listed: list[Case]) -> set[str]:
    """Evenly out of each kind and stage."""
    groups: dict[tuple[int, str], list[str]] = {}
    for case in filter(lambda case: case.quick, listed):
        groups.setdefault((case.kind, case.stage), []).append(case.id)
    return {ids[len(ids) * (2 * i + 1) // (2 * CHOSEN)] for ids in groups.values() for i in range(min(CHOSEN, len(ids)))}

"""Two of validate's reports: what changed between them, and what of it became worse."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.junit import JUnitCase, write_junit
from suture.core.named import write_text
from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.core.reader import read_json
from suture.core.typed import Strict, check
from suture.validate.options import STDOUT, ValidateOptions
from suture.validate.results import check_targets

ORDER = (FAILED, DIFFERENT, NOT_RUN, PASSED)  # from worst to best
GROWN = 2.0  # by which an error has grown for more than another rounding
HEAVIER = 1.01  # by which bytes have


Count = Annotated[int, Field(ge=0)]


class Worst(Strict):
    error: Annotated[float, Field(ge=0)] | None


class ReportedComparison(Strict):
    worst: Worst | None = None


class ReportedLevel(Strict):
    number: int | None
    title: str
    status: Annotated[str, Field(pattern=f"^({'|'.join(ORDER)})$")]
    comparison: ReportedComparison | None = None


class ReportedProfile(Strict):
    name: str
    kernels: Count | None = None
    total_bytes: Count | None = None


class ReportedEngine(Strict):
    engine_bytes: Count | None = None
    profiles: list[ReportedProfile] = Field(default_factory=list)


class ReportedPart(Strict):
    name: str
    engine: ReportedEngine | None = None


class ValidateReport(Strict):
    """report.json, as far as it is read."""

    levels: list[ReportedLevel]
    parts: list[ReportedPart] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """`before` and `after`: as they are shown; None for what one report has not."""

    what: str
    before: str | None
    after: str | None
    worse: bool


def compare_reports(first: Path, second: Path, options: ValidateOptions) -> int:
    """Shows what changed. Returns the exit status: that of a difference where something became worse. Raises UserError for
    what is not a report of validate's."""
    paths = [_path(first), _path(second)]
    check_targets(options, paths)
    before, after = map(_read, paths)
    changes = list(changed(before, after))
    worse = [change for change in changes if change.worse]
    found = {
        "before": str(paths[0]),
        "after": str(paths[1]),
        "worse": len(worse),
        "changes": [asdict(each) for each in changes],
    }
    text = json.dumps(found, indent=2) + "\n"
    if options.json == STDOUT:
        sys.stdout.write(text)
    elif options.json is not None:
        write_text(options.json, text)
    if options.junit is not None:
        cases = [JUnitCase("reports", each.what, (f"{each.before} before, {each.after} now",) * each.worse) for each in changes]
        write_junit(f"suture compare {first} {second}", cases or [JUnitCase("reports", "nothing changed")], options.junit)
    if options.json != STDOUT:
        _show(changes)
        print(f"compare: {len(changes)} changes, {len(worse)} for the worse")
    return FOUND_DIFFERENCE if worse else DONE


def changed(before: dict, after: dict) -> Iterator[Change]:
    """Levels and their errors, engines' bytes and kernels, and versions."""
    levels = [{_title(level): level for level in report["levels"]} for report in (before, after)]
    for title in dict.fromkeys([*levels[0], *levels[1]]):
        yield from _level(title, *(side.get(title) for side in levels))
    engines = [{part["name"]: part.get("engine") or {} for part in report.get("parts", [])} for report in (before, after)]
    for name in dict.fromkeys([*engines[0], *engines[1]]):
        yield from _engine(name, *(side.get(name, {}) for side in engines))
    known = [report.get("versions", {}) for report in (before, after)]
    for name in sorted({*known[0], *known[1]}):
        old, new = (side.get(name) for side in known)
        if old != new:
            yield Change(f"version of {name}", old and old[:12], new and new[:12], False)


def _level(title: str, old: dict | None, new: dict | None) -> Iterator[Change]:
    statuses = [level["status"] if level else None for level in (old, new)]
    if statuses[0] != statuses[1]:
        ranks = [ORDER.index(status or NOT_RUN) for status in statuses]
        yield Change(title, *statuses, ranks[1] < ranks[0])
    errors = [_errors(level or {}) for level in (old, new)]
    for what in (each for each in errors[0] if each in errors[1]):
        a, b = (side[what] for side in errors)
        if a != b:
            yield Change(f"{title}: {what}", f"{a:.1e}", f"{b:.1e}", b > GROWN * a and statuses == [PASSED, PASSED])


def _engine(name: str, old: dict, new: dict) -> Iterator[Change]:
    if bool(old) != bool(new):
        yield Change(f"{name}: engine", *("built" if engine else None for engine in (old, new)), bool(old))
        return
    numbers = [_numbers(engine) for engine in (old, new)]
    for what in dict.fromkeys([*numbers[0], *numbers[1]]):
        a, b = (side.get(what) for side in numbers)
        if a != b:
            limit = 1.0 if what.startswith("kernels") else HEAVIER
            yield Change(f"{name}: {what}", *(None if each is None else f"{each:,}" for each in (a, b)),
                         a is not None and b is not None and b > limit * a)  # fmt: skip


def _numbers(engine: dict) -> dict[str, int]:
    found = {"bytes of the engine": engine["engine_bytes"]} if engine.get("engine_bytes") is not None else {}
    for profile in engine.get("profiles", []):
        if profile.get("kernels") is not None:
            found[f"kernels in {profile['name']}"] = profile["kernels"]
        if profile.get("total_bytes") is not None:
            found[f"bytes moved in {profile['name']}"] = profile["total_bytes"]
    return found


def _title(level: dict) -> str:
    return f"level {level['number']}, {level['title']}" if level["number"] else level["title"]


def _errors(level: dict) -> dict[str, float]:
    """Of a comparison its worst error; of text, each reading's divergence."""
    worst = (level.get("comparison") or {}).get("worst") or {}
    found = {"worst error": worst.get("error")}
    found |= {f"mean KL of {each['name']}": each.get("mean_kl") for each in (level.get("tokens") or {}).get("readings", ())}
    return {what: error for what, error in found.items() if error is not None}


def _path(path: Path) -> Path:
    """The report's file: of a pipeline's folder, of validate's, or itself."""
    known = [path / "validate" / "report.json", path / "report.json"]
    return next((file for file in known if file.is_file()), known[0]) if path.is_dir() else path


def _read(path: Path) -> dict:
    remedy = "name validate's report.json, or the folder that has it"
    report = read_json(path, remedy)
    if not report.get("levels"):
        raise UserError(path, "is not a report of validate's", remedy)
    check(report, ValidateReport, path, remedy)
    return report


def _show(changes: list[Change]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "before", "now", ""):
        table.add_column(heading, overflow="fold")
    for each in sorted(changes, key=lambda each: not each.worse):
        style = "bold red" if each.worse else None
        shown = map(escape, (each.what, each.before or "-", each.after or "-", "worse" if each.worse else ""))
        table.add_row(*shown, style=style)
    Console().print(table)

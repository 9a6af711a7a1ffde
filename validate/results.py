"""What validate and compare found, for other programs: JSON and JUnit's XML of the report's levels."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from suture.core.junit import JUnitCase, write_junit
from suture.core.named import check_results, write_text
from suture.core.proof.verdict import DIFFERENT, FAILED, NOT_RUN
from suture.validate.options import STDOUT, ValidateOptions


def check_targets(options: ValidateOptions, read: Iterable[Path | None], out: Path | None = None) -> None:
    """Raises UserError where a file that is to be written would replace another, or stand in the folder `out`."""
    check_results({"--json": None if options.json == STDOUT else options.json, "--junit": options.junit}, read, out)


def write_results(title: str, verdict: str, status: int, levels: list[dict], options: ValidateOptions) -> None:
    """`levels`: as report.json has them."""
    found = {"title": title, "verdict": verdict, "exit_status": status, "levels": levels}
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    if options.json == STDOUT:
        sys.stdout.write(text)
    elif options.json is not None:
        write_text(options.json, text)
    if options.junit is not None:
        write_junit(f"suture {title}", [case for level in levels for case in _cases(level)], options.junit)


def _cases(level: dict) -> list[JUnitCase]:
    """One for the level, one for each set of inputs that it was compared on."""
    name = f"level {level['number']}: {level['title']}" if level["number"] else level["title"]
    reason = level["reason"] or level["status"]
    failures = (reason,) if level["status"] in (DIFFERENT, FAILED) else ()
    cases = [JUnitCase("levels", name, failures, reason if level["status"] == NOT_RUN else None)]
    for scenario in (level["comparison"] or {"scenarios": []})["scenarios"]:
        said = scenario["reason"] or f"differs by more than {level['comparison']['tolerance']:.0e}"
        failed = (said,) if scenario["status"] == DIFFERENT else ()
        cases.append(JUnitCase(name, scenario["name"], failed, said if scenario["status"] == NOT_RUN else None))
    return cases

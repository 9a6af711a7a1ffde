"""The report: one dictionary, written as report.json and rendered as report.html and summary.md."""

import base64
import dataclasses
import json
import math
import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from suture.core.command import DONE, FOUND_DIFFERENCE
from suture.core.errors import UserError
from suture.core.manifest import peak_memory, read_manifest, result
from suture.core.parts import PartFolder, find_parts
from suture.core.reader import read_bytes, read_json
from suture.validate import plots
from suture.validate.compare import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.validate.level import Level
from suture.validate.summary import summarise
from suture.validate.units import duration, error_text, size_text

STAGES = ("export", "surgery", "build")
BAR_FLOOR = 1e-9  # a difference this small, or none, has no bar


def verdict(levels: list[Level]) -> str:
    """Failed if any level is, else different if any is, else passed if any passed: what was not run does neither."""
    statuses = {level.status for level in levels}
    return next((status for status in (FAILED, DIFFERENT, PASSED) if status in statuses), NOT_RUN)


def exit_status(verdict: str) -> int:
    return FOUND_DIFFERENCE if verdict in (DIFFERENT, FAILED) else DONE


def make_report(title: str, levels: list[Level], versions: dict, started: float, folder: Path | None = None) -> dict:
    """What report.json holds. `folder`: the pipeline's, where there is one; `started`: by time.monotonic()."""
    parts = find_parts(folder) if folder else ()
    several = len(parts) > 1
    stages = [stage for part in parts for name in STAGES if (stage := _stage(part, name, several))]
    stages.append({"name": "validate", "seconds": round(time.monotonic() - started, 3),
                   "peak_memory_bytes": peak_memory(), "outputs": {}, "options": {}})  # fmt: skip
    return {
        "title": title,
        "verdict": verdict(levels),
        "summary": _summary(levels),
        "stages": stages,
        "parts": [
            {
                "name": part.name,
                "surgery": _read(part.folder / "surgery", "report.json"),
                "engine": _engine(part.folder / "build"),
            }
            for part in parts
        ],
        "levels": [as_json(level) for level in levels],
        "versions": versions,
    }


def write_report(report: dict, folder: Path, pipeline: Path | None = None) -> None:
    """`pipeline`: the folder in which surgery has drawn one layer before and after, where there is one."""
    pictures = {part.name: _pictures(part.folder / "surgery") for part in find_parts(pipeline)} if pipeline else {}
    try:
        page, summary = render(report, pictures), summarise(report)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        if not any(part["surgery"] or part["engine"] for part in report["parts"]):
            raise
        for part in report["parts"]:
            part |= {"surgery": None, "engine": None}  # what lies in their reports' place is none
        report["summary"] += " What surgery or build wrote about its work cannot be read."
        page, summary = render(report, pictures), summarise(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    (folder / "summary.md").write_text(summary, encoding="utf-8", errors="backslashreplace")


def render(report: dict, pictures: dict[str, dict[str, str]] | None = None) -> str:
    """The report as one HTML page that needs nothing beside it, and shows no markup from a file: text is escaped, and
    `pictures`, by part SVG of a layer by before and after as data URIs, are images, in which no script runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"error": error_text, "bytes": size_text, "seconds": duration, "bar": _bar}
    return environment.get_template("report.html.j2").render(report, plots=plots, drawn=pictures or {})


def _pictures(surgery: Path) -> dict[str, str]:
    """What surgery's last run drew, both or none, as data URIs."""
    drawn = {when: f"{when}.svg" for when in ("before", "after")}
    outputs = (read_manifest(surgery) or {}).get("outputs", {})
    if not all(name in outputs and (surgery / name).is_file() for name in drawn.values()):
        return {}
    encoded = {when: base64.b64encode(read_bytes(surgery / name)).decode() for when, name in drawn.items()}
    return {when: f"data:image/svg+xml;base64,{data}" for when, data in encoded.items()}


def _summary(levels: list[Level]) -> str:
    """One sentence a person reads first."""
    broken = [level for level in levels if level.status == FAILED]
    different = [level for level in levels if level.status == DIFFERENT]
    passed = [level for level in levels if level.status == PASSED]
    left = [level for level in levels if level.status == NOT_RUN]
    parts = []
    if broken:
        parts.append("Failed: " + "; ".join(level.title for level in broken) + ".")
    if different:
        parts.append("A difference was found: " + "; ".join(level.title for level in different) + ".")
    elif passed and not broken:
        parts.append(f"All that ran agrees: {len(passed)} of {len(levels)} levels." if len(levels) > 1 else "They agree.")
    if left:
        parts.append("Not run: " + "; ".join(level.title for level in left) + ".")
    return " ".join(parts)


def as_json(level: Level) -> dict:
    """A level as report.json has it."""
    found = dataclasses.asdict(level)
    if level.comparison:
        worst = level.comparison.worst
        named = [each.name for each in level.comparison.scenarios if any(output is worst for output in each.outputs)]
        found["comparison"]["worst"] = dataclasses.asdict(worst) | {"scenario": named[0]} if worst else None
    return found


def _stage(part: PartFolder, name: str, several: bool) -> dict | None:
    manifest = read_manifest(part.folder / name)
    return manifest and {
        "name": f"{name} of {part.name}" if several else name,
        **{key: manifest.get(key) for key in ("seconds", "peak_memory_bytes", "outputs", "options")},
    }


def _engine(folder: Path) -> dict | None:
    """What build/ knows of an engine without running it; its profiles where their kernels were listed."""
    described = _read(folder, "engine.json")
    kept = ("tensorrt", "compute_capabilities", "engine_bytes", "findings", "memory")
    try:
        if not all("decode_bytes" in profile for profile in described["profiles"]):
            return None
        profiles = [_profile(each) for each in described["profiles"]]
        return {
            **{key: described[key] for key in kept},
            "decodes": described.get("signature") is not None,
            "profiles": profiles,
        }
    except (TypeError, LookupError, AttributeError):  # level 4 says so
        return None


def _profile(described: dict) -> dict:
    """Also what a decoding step moves in total, and that as a multiple of the floor."""
    moved, floor = described["decode_bytes"], described["floor_bytes"]
    total = sum(moved.values()) if moved else None
    return {**described, "shapes": None, "total_bytes": total, "over_floor": total / floor if total and floor else None}


def _read(folder: Path, name: str) -> dict | None:
    """A stage's own report; None where its last run wrote none, or what lies in its place is none."""
    try:
        return read_json(path) if (path := result(folder, name)) else None
    except UserError:
        return None


def _bar(error: float | None, tolerance: float) -> float:
    """Percent of a bar's length, on a logarithmic scale on which the tolerance stands at 80."""
    if error is None or error > tolerance * 100:
        return 100.0
    floor = min(BAR_FLOOR, tolerance / 10)
    decades = math.log10(max(error, floor) / floor) / math.log10(tolerance / floor)
    return round(min(80 * decades, 100.0), 1)

"""The report as Markdown that fits a comment on a pull request: verdict, levels, what was not run, near misses and why, cost."""

import re
from collections.abc import Iterator

from suture.core.errors import one_line
from suture.core.proof.verdict import NOT_RUN
from suture.validate.units import error_text, size_text

MOST_NEAR_MISSES = 20
LONGEST = 300  # characters of a reason or a name
MARKS = re.compile(r"([\\`*_\[\](){}<>#|~!@&])")


def summarise(report: dict) -> str:
    """`report`: as report.json has it. Nothing in it that comes from a file becomes markup or a mention."""
    return "\n".join(
        [
            f"### {_plain(report['title'])}: {report['verdict']}",
            "",
            _plain(report["summary"]),
            "",
            *_levels(report["levels"]),
            *_not_run(report["levels"]),
            *_near_misses(report["parts"]),
            *_engines(report["parts"]),
            "",
        ]
    )


def _levels(levels: list[dict]) -> Iterator[str]:
    yield "| level | verdict | worst scenario | error | allowed |"
    yield "|---|---|---|---|---|"
    for level in levels:
        comparison, tokens = level["comparison"], level["tokens"]
        worst = (comparison or {}).get("worst")
        cells = ["–", "–", "–"]
        if worst:
            error = worst["problem"] or error_text(worst["error"])
            cells = [f"{worst['scenario']}, {worst['output']}", error, error_text(comparison["tolerance"])]
        elif tokens:
            reading = tokens["readings"][0]
            agreed, limit = (100 * number for number in (reading["agreement"], tokens["limits"]["agreement"]))
            cells = [reading["name"], f"{agreed:.4g} % of the likeliest tokens alike", f"{limit:g} % at least"]
        elif pictures := level["pictures"]:
            least = min(pair["ssim"] for pair in pictures["pairs"])
            cells = [
                f"{len(pictures['pairs'])} pictures",
                f"structural similarity {least:.4f}",
                f"{pictures['limits']['ssim']:g} at least",
            ]
        elif masks := level["masks"]:
            alike, limit = (f"{masks[name]:.4f}" for name in ("alike", "limit"))
            cells = [f"{masks['pictures']} pictures", f"masks alike by {alike}", f"{limit} at least"]
        elif answers := level["answers"]:
            cells = [f"{len(answers['answers'])} answers", f"{answers['alike']} alike, mean KL {answers['mean_kl']:.2g}",
                     f"{answers['kl_limit']:g} at most"]  # fmt: skip
        elif frames := level["frames"]:
            worst = min(*frames["psnr"], frames["canonical"], *frames["edited"])
            cells = [f"{len(frames['psnr'])} frames", f"{worst:.1f} dB", f"{frames['limit']:g} dB at least"]
        elif drive := level["drive"]:
            apart = max(drive["box"], drive["trajectory"], drive["plan"])
            tracks = f"{drive['same']} of {drive['objects']} tracks alike, {apart:.2g} m apart"
            cells = [f"{drive['frames']} frames", tracks, f"{drive['metres']:g} m at most"]
        mark = level["status"] if level["status"] == "passed" else f"**{level['status']}**"
        yield f"| {_title(level)} | {mark} | {' | '.join(map(_plain, cells))} |"


def _not_run(levels: list[dict]) -> Iterator[str]:
    left = [level for level in levels if level["status"] == NOT_RUN]
    if left:
        yield from ("", "**Not run**, which is not passed:", "")
        yield from (f"- {_title(level)}: {_plain(level['reason'] or 'no reason is known')}" for level in left)


def _near_misses(parts: list[dict]) -> Iterator[str]:
    """What stayed unfused in the finished graphs, alike cases in one line."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for part in parts:
        for each in (part["surgery"] or {}).get("unfused", ()):
            together.setdefault((each["op"], each["pass"], each["reason"]), []).append(each["node"])
    if not together:
        return
    yield from ("", f"**Near misses** ({sum(map(len, together.values()))} nodes):", "")
    for (op, name, reason), nodes in list(together.items())[:MOST_NEAR_MISSES]:
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"- {_plain(op)} at {_plain(nodes[0])}{more}: {_plain(f'{name}: {reason}' if name else reason)}"
    if len(together) > MOST_NEAR_MISSES:
        yield f"- and {len(together) - MOST_NEAR_MISSES} more reasons, in report.html"


def _engines(parts: list[dict]) -> Iterator[str]:
    for part in parts:
        engine = part["engine"]
        if engine:
            kernels = [f"{each['kernels']} kernels in {_plain(each['name'])}" for each in engine["profiles"]]
            yield from (
                "",
                f"**Engine** of {_plain(part['name'])}: {', '.join([size_text(engine['engine_bytes']), *kernels])}.",
            )


def _title(level: dict) -> str:
    return _plain(f"{level['number']} {level['title']}" if level["number"] else level["title"])


def _plain(text: object) -> str:
    """One line without markup; no name in it mentions a user."""
    line = one_line(str(text))
    short = line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
    return MARKS.sub(r"\\\1", short).replace("@", "@\u2060")

"""Kind 12: output that nobody reads, locales, names with markup or that are not UTF-8, and runs that are interrupted or killed."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.abuse.case import ARGUMENTS, CUTTERS, DONE, FINISHED, NO_TRACE, Case, folder_of
from tests.abuse.kind_04_faults import passed

PROMISE = "the work is done and has its status wherever its output goes; names are shown, never obeyed; 130 when interrupted"
STAGES = ("export", "surgery", "build", "validate", "generate", "check", "compare", *CUTTERS)
RESULT = ("generate", "check")  # what they print is their result
LOCALES = {
    "the C locale": (("LC_ALL", "C"), ("PYTHONUTF8", "0")), "Latin-1": (("PYTHONIOENCODING", "latin-1"),),
    "ASCII": (("PYTHONIOENCODING", "ascii:strict"),), "no terminal": (("TERM", "dumb"), ("COLUMNS", "1")),
    "a wide one": (("COLUMNS", "9999"),), "a negative width": (("COLUMNS", "-1"),), "no number for a width": (("COLUMNS", "x"),),
    "colours by force": (("FORCE_COLOR", "1"),), "no colours": (("NO_COLOR", "1"),), "no kind of terminal": (("TERM", ""),),
}  # fmt: skip
NAMES = {
    "markup of rich": "[bold red]x[/]", "markup that does not close": "[/red]", "HTML": "<script>alert(1)<", "a quote": "a\"'b",
    "control characters": "a\x1b[2Jb", "a line break": "a\nb", "braces": "{0}%s", "right to left": "a\u202eb", "a dash": "-x",
    "an emoji": "\N{SMILING FACE WITH SUNGLASSES}", "spaces": "  a b ", "long": "n" * 200,
    "a command": "$(touch hit)`touch hit`", "a pattern": "*?[a-z]", "a tab": "a\tb", "a backslash": "a\\nb", "zero width": "a\u200bb",
    "a carriage return": "a\rb", "a link of rich": "[link=x]y[/link]", "combining": "e\u0301" * 40, "a tilde": "~", "a colon": "a:b",
}  # fmt: skip
NO_UTF8 = (b"\xff", b"a\xfe\xffb", b"\xc3", b"caf\xe9")
PLACES = {  # where a fault is planted, once the stage is at work
    "surgery": "suture.surgery.stage:operate", "build": "suture.build.stage:audit_graph", "validate": "suture.validate.stage:open_graph",
    "generate": "suture.generate.command:open_model", "check": "suture.validate.check:check",
    "compare": "suture.validate.stage:subject_of",
    "surgery.capacity": "suture.core.weights:load_graph", "surgery.ranks": "suture.core.weights:load_graph",
    "surgery.join": "suture.surgery.connect:check_model",
    "surgery.once": "suture.surgery.stage:operate", "export": "suture.core.stage:Stage.up_to_date",
}  # fmt: skip


def called(name: str, folder: str) -> Callable[[Path], None]:
    """The input's folder by another name."""

    def damage(work: Path) -> None:
        (work / name).parent.mkdir(parents=True, exist_ok=True)  # a closing tag has a slash
        (work / folder).rename(work / name)

    return damage


def renamed(stage: str, name: str) -> tuple[tuple[str, ...], str]:
    folder = "checkpoint" if stage == "export" else folder_of(stage)
    return tuple(word.replace(f"{{work}}/{folder}", f"{{work}}/{name}") for word in ARGUMENTS[stage]), folder


def good(stage: str, name: str, **settings) -> Case:
    usual = {"expected": DONE.get(stage, (0,)), "fault": NO_TRACE if stage == "export" else None}
    return Case(12, stage, name, PROMISE, settings.pop("damage", lambda work: None), **(usual | settings))


def _named(stage: str, what: str, name: str) -> Case:
    arguments, folder = renamed(stage, name)
    return good(stage, what, damage=called(name, folder), arguments=arguments, more=FINISHED.get(stage, ()))


def _no_utf8(stage: str, name: bytes) -> Case:
    text = os.fsdecode(name)
    arguments, folder = renamed(stage, text)
    return Case(12, stage, f"no UTF-8 {name!r}", PROMISE, called(text, folder), "is not UTF-8; rename it", arguments=arguments)


CASES = [
    *(good(stage, f"{stdout} output", stdout=stdout) for stage in STAGES for stdout in ("closed", "unread")),
    *(good(stage, "a full disk for output", stdout="full", expected=(2,), says="standard output: no space left",
           more=FINISHED.get(stage, ())) for stage in RESULT),
    *(good(stage, f"{name}", environment=environment) for stage in STAGES for name, environment in LOCALES.items()),
    *(_named(stage, what, name) for stage in STAGES for what, name in NAMES.items()),
    *(_no_utf8(stage, name) for stage in STAGES for name in NO_UTF8),
    *(good(stage, "interrupted at work", fault=(place, "KeyboardInterrupt"), expected=(130,)) for stage, place in PLACES.items()),
    *(good("pipeline", f"{name} ends {stage}", damage=passed, ended=(stage, -number), expected=(3,), prints_not="passed")
      for stage in ("export", "surgery", "build", "validate") for name, number in
      (("SIGKILL", 9), ("SIGTERM", 15), ("SIGSEGV", 11), ("SIGABRT", 6), ("SIGBUS", 7))),
]  # fmt: skip

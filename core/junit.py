"""Results of checks as JUnit's XML, for CI."""

import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

from suture.core.named import appearing


@dataclass(frozen=True)
class JUnitCase:
    """One check. `failures`: what is wrong, none where it passed. `skipped`: why it was not run."""

    group: str
    name: str
    failures: tuple[str, ...] = ()
    skipped: str | None = None


def write_junit(name: str, cases: list[JUnitCase], path: Path) -> None:
    suite = xml.Element("testsuite", name=_legal(name))
    for each in cases:
        case = xml.SubElement(suite, "testcase", classname=_legal(each.group), name=_legal(each.name))
        if each.failures:
            xml.SubElement(case, "failure", message=_legal(each.failures[0])).text = _legal("\n".join(each.failures))
        elif each.skipped is not None:
            xml.SubElement(case, "skipped", message=_legal(each.skipped))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    with appearing(path) as file:
        xml.ElementTree(suite).write(file, encoding="utf-8", xml_declaration=True)


def _legal(text: str) -> str:
    """Without the control characters that XML does not allow, which a name in a graph may have."""
    return "".join(letter for letter in text if letter in "\t\n" or (letter >= " " and not "\ud800" <= letter <= "\udfff"))

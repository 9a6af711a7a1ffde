"""A check's result for other programs: JSON, and JUnit's XML for CI."""

import json
import xml.etree.ElementTree as xml
from dataclasses import asdict
from pathlib import Path

from suture.core.network.check import CheckResult


def as_json(result: CheckResult, against: list[str] | None = None) -> str:
    report = {
        "model": str(result.model),
        "tensorrt": result.tensorrt,
        "verdict": result.verdict,
        "exit_status": result.status or int(bool(against)),
        "nodes": result.nodes,
        "layers": len(result.network.layers) if result.network else 0,
        "refused": [asdict(refusal) for refusal in result.refusals],
        "all_read": result.all_read,
        "findings": [asdict(finding) for finding in result.findings],
        "attention": [asdict(attention) for attention in result.attentions],
        "tolerance": result.tolerance,
        "not_compared": result.not_compared,
        "inputs": [
            {
                "name": outcome.feeds,
                "problem": outcome.problem,
                "outputs": [asdict(output) for output in outcome.outputs],
                "divergence": outcome.divergence and asdict(outcome.divergence),
            }
            for outcome in result.outcomes
        ],
    }
    if against is not None:
        report["against"] = against
    return json.dumps(report, indent=2) + "\n"


def write_junit(result: CheckResult, path: Path, against: list[str] | None = None) -> None:
    """One case for the parser, one for each error and warning of the audit, one for each output and set of inputs."""
    suite = xml.Element("testsuite", name=f"suture check {result.model.name}")
    _case(suite, "parser", "parses", [str(refusal) for refusal in result.refusals])
    for finding in result.findings:
        _case(suite, "audit", finding.where, [str(finding)] if finding.severity == "error" else [])
    for outcome in result.outcomes:
        for output in outcome.outputs:
            wrong = output.beyond(result.tolerance)
            said = f"{output.problem or f'{output.error:.1e}'} (allowed {result.tolerance:.0e})"
            _case(suite, outcome.feeds, output.tensor, [said] if wrong else [])
    if result.not_compared:
        case = _case(suite, "network", "agrees with onnxruntime", [result.failed] if result.failed else [])
        if not result.failed:
            xml.SubElement(case, "skipped", message=_legal(result.not_compared))
    if against is not None:
        _case(suite, "network", "as saved", against)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    xml.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: xml.Element, group: str, name: str, failures: list[str]) -> xml.Element:
    case = xml.SubElement(suite, "testcase", classname=_legal(group), name=_legal(name))
    if failures:
        xml.SubElement(case, "failure", message=_legal(failures[0])).text = _legal("\n".join(failures))
    return case


def _legal(text: str) -> str:
    """Without the control characters that XML does not allow, which a name in a graph may have."""
    return "".join(letter for letter in text if letter in "\t\n" or (letter >= " " and not "\ud800" <= letter <= "\udfff"))

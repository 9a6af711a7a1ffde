"""A check's result for other programs: JSON, and JUnit's XML for CI."""

import json
from dataclasses import asdict

from suture.core.junit import JUnitCase
from suture.core.network.check import CheckResult


def as_json(result: CheckResult, against: list[str] | None = None) -> str:
    report = {
        "model": str(result.model),
        "tensorrt": result.tensorrt,
        "verdict": result.verdict,
        "exit_status": result.status or int(bool(against)),
        "nodes": result.nodes,
        "layers": len(result.network.layers) if result.network else 0,
        "repaired": result.repairs,
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


def junit_cases(result: CheckResult, against: list[str] | None = None) -> list[JUnitCase]:
    """One case for the parser, one for each error and warning of the audit, one for each output and set of inputs."""
    cases = [JUnitCase("parser", "parses", tuple(str(refusal) for refusal in result.refusals))]
    for finding in result.findings:
        cases.append(JUnitCase("audit", finding.where, (str(finding),) if finding.severity == "error" else ()))
    for outcome in result.outcomes:
        for output in outcome.outputs:
            said = f"{output.problem or f'{output.error:.1e}'} (allowed {result.tolerance:.0e})"
            cases.append(JUnitCase(outcome.feeds, output.tensor, (said,) if output.beyond(result.tolerance) else ()))
    if result.not_compared:
        failures = (result.failed,) if result.failed else ()
        cases.append(JUnitCase("network", "agrees with onnxruntime", failures, result.not_compared))
    if against is not None:
        cases.append(JUnitCase("network", "as saved", tuple(against)))
    return cases

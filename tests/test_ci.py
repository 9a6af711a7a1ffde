"""CI's workflow runs what .ci/run does, and the hooks before a commit are the environment's own tools."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_workflow_runs_all_that_the_script_does():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run ${{ matrix.targets }}"
    jobs = [targets.split() for targets in job["strategy"]["matrix"]["targets"]]
    script = (ROOT / ".ci" / "run").read_text()
    (every,) = re.findall(r"\|\| set -- (.*)", script)
    assert sorted(target for each in jobs for target in each) == sorted(every.split())
    assert {"test", "slow", "lint"} <= set(every.split())
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in every.split())


def test_hooks_need_nothing_but_the_environment():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"] for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "types"}
    assert all(".venv/bin/" in hook["entry"] and hook["language"] == "system" for hook in repo["hooks"])

"""The table of model families in docs/families.md, and docs/models.md, from what their tests found.

    python -m benchmarks.models                     # runs the tests, every type and GPU and width among them: hours
    python -m benchmarks.models --only EXPRESSION   # only these (pytest's -k); what others found stays as it was
    python -m benchmarks.models --from RESULTS.xml  # runs none: takes what pytest's --junitxml wrote

docs/models.json has each test's outcome and what it measured. A family is in families.md if its tests have passed, else
the command says which have not, and writes no table.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.tables import FAMILIES, put
from suture.core.command import CommandParser, run
from suture.core.errors import UserError
from suture.models.named import decoders
from tests.families import CAPABILITIES, TYPES
from tests.families import FAMILIES as TESTED

ROOT = Path(__file__).parents[1]
RESULTS, DETAILS = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
PUBLISHED = ROOT / "tests" / "presets.json"
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("models", "presets", "real_width", "qwen", "cpm", "cpm_graphs", "cpm_text", "uniad_parts")
)
COMMAND = "python -m benchmarks.models"
# family -> what it covers, and the preset of its real dimensions; any other covers what its class in transformers does
COVERS = {
    "qwen": ("Qwen-7B, Qwen-7B-Chat", "qwen-7b"),
    "llama": ("LLaMA, LLaMA-2-7B, Aquila-7B", "llama-2-7b"),
    "mistral": ("Mistral, with a window and without", "mistral-7b"),
    "qwen2": ("Qwen1.5, Qwen2, Qwen2.5", "qwen2.5-7b"),
    "qwen3": ("Qwen3", "qwen3-8b"),
    "gpt2": ("gpt2-medium, camel-5b", "gpt2-medium"),
    "opt": ("Galactica", "galactica-6.7b"),
    "mpt": ("mpt-7B-65K", "mpt-7b-storywriter"),
    "gptbigcode": ("WizardCoder-15B", "wizardcoder-15b"),
    "decicoder": ("DeciCoder-1b", "decicoder-1b"),
    "cpmant": ("CPM-Ant", "cpm-ant-10b"),
    "cpmbee": ("CPM-Bee (levels with made-up segments)", "cpm-bee-10b"),
    "whisper": ("Whisper, encoder and decoder", "whisper-large-v2"),
}
NUMBERS = {  # tests of numbers that no family shares
    "qwen": [f"tests/test_qwen.py::test_logits_are_the_originals[{case}]" for case in range(4)],
    "cpmant": ["tests/test_cpm.py::test_ants_numbers_are_transformers"],
    "cpmbee": ["tests/test_cpm.py::test_bees_numbers_are_the_originals"],
    "whisper": ["tests/test_models.py::test_whispers_numbers_are_transformers"],
}

NOT_RUN = "not run"
Results = dict[str, dict]  # by a test's name, as pytest gives it: its outcome, seconds, and what it measured
LEVELS = "tests/test_models.py::test_fuses_all_and_every_level_agrees[{}-{}]"
ENGINE = "tests/test_models.py::test_an_engine_is_built[{}-{}-{}]"
NUMBER = "tests/test_models.py::test_numbers_are_transformers[{}]"
REPEAT = "tests/test_models.py::test_repeated_layers_are_the_whole_trace[{}]"
PRESET = "tests/test_presets.py::test_a_preset_has_the_parameters_that_were_published[{}]"
WIDTH = "tests/test_real_width.py::test_two_layers_at_real_width[{}]"


def main() -> None:
    parser = CommandParser(prog="models", description="Make the tables of models from what their tests found.")
    parser.add_argument("--only", metavar="EXPRESSION", help="run only these tests, as pytest's -k has it")
    parser.add_argument("--from", dest="xml", metavar="RESULTS.xml", type=Path, help="run none: take this run of pytest")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= read(options.xml) if options.xml else run_tests(options.only)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    overview, details = table(results), documents(results)
    FAMILIES.write_text(put(FAMILIES.read_text(), COMMAND, overview))
    DETAILS.write_text(details)


def run_tests(only: str | None) -> Results:
    """Runs the tests of models one after another, those that take long as well."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "", "--junitxml", str(found), *TESTS]
        command += ["-k", only] if only else []
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        return read(found)


def read(path: Path) -> Results:
    """Each test of a run, by pytest's name for it. Raises UserError for a file that is no such run."""
    try:
        cases = ElementTree.parse(path).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(path, f"is not a run of pytest ({error})", "name what pytest's --junitxml wrote") from None
    results = {}
    for case in cases:
        bad = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        measured = {each.get("name"): each.get("value") for each in case.iter("property")}
        results[name] = {"outcome": bad or "passed", "seconds": round(float(case.get("time"))), **measured}
    return results


def table(results: Results) -> str:
    """families.md's. Raises UserError naming the first test that a row lacks."""
    heading = ("family", "covers", "parameters", "fused", "onnxruntime match", "network match", "engine for")
    return _markdown(heading, [row(results, name) for name in rows(results)])


def rows(results: Results) -> list[str]:
    """The families in the tables' order: one without a line in COVERS has a row from when its tests have run."""
    return [*COVERS, *(name for name in TESTED if name not in COVERS and LEVELS.format(name, "float32") in results)]


def row(results: Results, name: str) -> list[str]:
    """A type that was not run has a dash. Raises UserError for a test that did not pass, and without any in float32."""
    covers, preset = COVERS.get(name, (TESTED[name].model, None))
    for test in NUMBERS.get(name, [NUMBER.format(name)]):
        passed(results, test)
    size = f"{passed(results, PRESET.format(preset))['parameters']} ({preset})" if preset else "–"
    fused = passed(results, LEVELS.format(name, "float32"))["fused"]
    match, network, engines = [], [], {}
    for dtype in TYPES:
        ran = LEVELS.format(name, dtype) in results
        found = passed(results, LEVELS.format(name, dtype)) if ran else {}
        assert found.get("fused", fused) == fused
        match.append(max(found["level 1"], found["level 2"], key=float) if ran else "–")
        network.append(found.get("level 3", "–"))
        if (built := ENGINE.format(name, dtype, CAPABILITIES)) in results:
            engines.setdefault(passed(results, built)["compute capabilities"], []).append(dtype)
    built = "; ".join(f"{gpus} ({', '.join(types)})" for gpus, types in engines.items()) or "–"
    tests = "../tests/test_qwen.py" if name == "qwen" else "../tests/test_models.py"
    return [f"[{name}]({tests})", covers, size, fused, ", ".join(match), ", ".join(network), built]


def passed(results: Results, test: str) -> dict:
    """What a test measured. Raises UserError where it has not passed."""
    found = results.get(test, {"outcome": NOT_RUN})
    if found["outcome"] != "passed":
        raise UserError(test, found["outcome"], "run python -m benchmarks.models, with --only and a part of its name")
    return found


def documents(results: Results) -> str:
    """docs/models.md: what families.md has no room for. What has not been run says so."""

    def found(test: str) -> list[str]:
        return [_cell(results, test, f"level {number}") for number in (1, 2, 3)]

    typed = [
        [f"{name}, {dtype}", *found(LEVELS.format(name, dtype)),
         _cell(results, ENGINE.format(name, dtype, CAPABILITIES), "compute capabilities")]
        for name in rows(results) for dtype in TYPES
    ]  # fmt: skip
    widths = [
        [preset, *found(WIDTH.format(preset)), _cell(results, WIDTH.format(preset), "compute capability"),
         _cell(results, WIDTH.format(preset), "bytes")]
        for preset in decoders()
    ]  # fmt: skip
    repeated = [[name, _cell(results, REPEAT.format(name))] for name in rows(results)]
    published = {preset: (each["parameters"], each["source"]) for preset, each in json.loads(PUBLISHED.read_text()).items()}
    sizes = [[preset, _cell(results, PRESET.format(preset), "counted"), f"[{said}]({source})"]
             for preset, (said, source) in published.items()]  # fmt: skip
    levels = ("PyTorch ↔ exported", "exported ↔ portable", "portable ↔ network", "engine for")
    parts = [TEXT["head"], TEXT["types"], _ran(("family", *levels), typed)]
    parts += [TEXT["widths"], _ran(("model", *levels, "bytes"), widths)]
    parts += [TEXT["repeat"], _ran(("family", "as traced whole"), repeated)]
    parts += [TEXT["presets"], _markdown(("preset", "parameters", "published"), sizes)]
    return "\n\n".join(parts) + "\n"


def _ran(heading: Sequence[str], rows: list[list[str]]) -> str:
    """What was run as a table, and the rest by name."""
    ran = [row for row in rows if set(row[1:]) != {NOT_RUN}]
    rest = "; ".join(row[0] for row in rows if row not in ran)
    return "\n\n".join(([_markdown(heading, ran)] if ran else []) + ([f"Not run: {rest}."] if rest else []))


TEXT = {
    "head": """# Models

What their tests found, in [models.json](models.json) by each test's name; `python -m benchmarks.models` runs them and makes
this. Errors are of the largest value that the reference has.""",
    "types": """## Every family in every type

Two layers of a tiny size, random weights, a static cache of 64 slots: prompts, chunks, decoding, ragged batches
([test_models.py](../tests/test_models.py)). In onnxruntime bfloat16 graphs run as float32 shadow copies, in TensorRT's network they
round as bfloat16 does. Whisper's errors are the larger of decoder's and encoder's.""",
    "widths": """## Two layers at the real width

The real width, heads and vocabulary in float32, random weights mapped from their files: all levels layer by layer, and an
engine with weights as inputs ([test_real_width.py](../tests/test_real_width.py)).""",
    "repeat": """## Layers traced once and written often

Of a model of five layers, four are traced and the middle one repeated; the graph computes the same expressions as one whose
five layers were all traced.""",
    "presets": """## Presets

Parameters counted in the model that a preset describes, beside what its makers say ([test_presets.py](../tests/test_presets.py)).""",
}


def _cell(results: Results, test: str, measured: str | None = None) -> str:
    found = results.get(test, {"outcome": NOT_RUN})
    value = found["outcome"] if measured is None or found["outcome"] != "passed" else found[measured]
    return f"{int(value):,}" if value.isdigit() else value


def _markdown(heading: Sequence[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


if __name__ == "__main__":
    run("models", main)

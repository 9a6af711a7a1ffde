"""The report's page, in the order in which it is read and in a browser; and its summary for a pull request."""

import json
import re

import pytest
from browser import CHROMIUM, look
from decoder_graphs import decoder, decoder_graph
from onnx import TensorProto
from test_validate_tokens import TEXT, Letters

import suture
from suture.validate.compare import DIFFERENT, NOT_RUN, PASSED
from suture.validate.level import Level
from suture.validate.levels import compare_graphs
from suture.validate.report import make_report, render
from suture.validate.summary import MOST_NEAR_MISSES, summarise
from suture.validate.tokens import compare_tokens

LONG = "past_key_values_of_a_layer_whose_exporter_has_no_mercy." * 6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> dict:
    """Of a pipeline with each kind of section, a difference, and names as long as exporters make them."""
    growing, wrong = decoder(static=False), decoder(static=True, disturb=1e-2)
    compared = compare_graphs(growing, wrong, None, 0)
    levels = [
        Level(1, "PyTorch ↔ exported graph", NOT_RUN, f"the checkpoint /models/{LONG} is not here"),
        Level(2, "Exported ↔ portable graph", DIFFERENT, comparison=compared.comparison),
        Level(5, "Tokens on real text", PASSED, tokens=compare_tokens(growing, decoder(static=True), Letters(), TEXT, TensorProto.FLOAT)),
    ]  # fmt: skip
    made = make_report(LONG[:120], levels, {"onnxruntime": "1", "tensorrt_rtx": "2"}, 0.0)
    surgery = suture.operate(decoder_graph(static=False), capacity=64, no_verify=True).report.as_json()
    surgery["unfused"] = [{"node": f"/{LONG}/Softmax_{index}", "op": "Softmax", "pass": "attention", "reason": f"its scale is @{index} | *new*"}
                          for index in range(MOST_NEAR_MISSES + 3)]  # fmt: skip
    profile = {"name": "decode", "kernels": 12, "kernels_by_layer": {"0": 6, "1": 6}, "total_bytes": 2000, "over_floor": 1.25,
               "floor_bytes": 1600, "decode_bytes": {"weights": 1000, "cache": 800, "other": 200}}  # fmt: skip
    memory = {"estimated": {"weights": 1, "caches": 2, "activations": 3, "logits": 4}}
    finding = {"severity": "warning", "where": LONG, "what": "what", "remedy": "do"}
    engine = {
        "engine_bytes": 2_820_000,
        "compute_capabilities": ["8.9"],
        "profiles": [profile],
        "findings": [finding],
        "memory": memory,
    }
    made["parts"] = [{"name": "decoder", "surgery": surgery, "engine": engine}]
    made["stages"].append(
        {"name": "surgery", "seconds": 1.0, "peak_memory_bytes": 10**9, "outputs": {f"{LONG}.onnx": 10}, "options": {}}
    )
    return json.loads(json.dumps(made))


@pytest.fixture(scope="module")
def page(report) -> str:
    return render(report)


@pytest.mark.seconds
def test_the_page_opens_with_what_a_reader_wants(report, page):
    headings = [re.sub(r"<[^>]*>|\s+", " ", each).split() for each in re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)]
    assert [heading[0] for heading in headings] == ["Levels", "Exported", "Tokens", "Not", "Stages", "Surgery", "Engine"]
    top = page.partition("<h2>Exported")[0]
    worst = max(
        (output for scenario in report["levels"][1]["comparison"]["scenarios"] for output in scenario["outputs"]),
        key=lambda output: output["error"],
    )
    assert report["levels"][1]["comparison"]["worst"].items() >= worst.items()
    assert report["levels"][1]["comparison"]["worst"]["scenario"] in top


def test_passes_that_matched_nothing_are_folded_away(report, page):
    """A pass that runs more than once has a row for each time."""
    passes = report["parts"][0]["surgery"]["passes"]
    shown, folded = page.partition("<h3>Passes</h3>")[2].split("passes that matched nothing</summary>")
    rows = [re.findall(r"<tr><td>(\w+)</td>", each.partition("</table>")[0]) for each in (shown, folded)]
    assert rows[0] == [each["name"] for each in passes if each["matches"]]
    assert rows[1] == [each["name"] for each in passes if not each["matches"]]
    assert all(rows)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1400, 700])
def test_in_a_browser_nothing_scrolls_sideways_and_the_verdict_is_on_top(width, page, tmp_path):
    found = look(page, width, tmp_path)
    assert found["scroll_width"] <= found["client_width"], found["wide"]
    assert found["wide"] == []
    assert found["scrolls"] == []
    assert 0 < found["verdict_bottom"] <= 600


def test_the_summary_fits_a_comment(report):
    text = summarise(report)
    assert len(text) < 65536  # GitHub's limit
    lines = text.splitlines()
    assert lines[0].endswith(f": {DIFFERENT}")
    assert any(line.startswith("| 2 Exported") and "**different**" in line for line in lines)
    assert any(line.startswith("- 1 PyTorch ↔ exported graph: the checkpoint") for line in lines)
    assert sum(line.startswith("- Softmax at") for line in lines) == MOST_NEAR_MISSES
    assert "- and 3 more reasons, in report.html" in lines
    assert "**Engine** of decoder: 2.82 MB, 12 kernels in decode." in lines


def test_nothing_in_the_summary_is_markup_or_a_mention(report):
    text = summarise(report)
    assert "*new*" not in text
    assert r"\| \*new\*" in text
    assert not re.search(r"@\w", text)

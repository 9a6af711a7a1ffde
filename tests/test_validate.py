"""validate/: that it passes what is right, and that each thing that can be wrong is reported as a difference."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from decoder_graphs import CAPACITY, VOCAB, decoder_graph
from onnx import TensorProto
from polygraphy.comparator import RunResults, SimpleCompareFunc

from contracts.errors import UserError
from contracts.twin import float32_twin
from runtime.decoders import GrowingDecoder, positions_of
from runtime.graphs import Graph, graph_of, open_graph
from validate.__main__ import main, validate_pipeline
from validate.compare import DIFFERENT, NOT_RUN, PASSED, SAVED_BYTES, TOLERANCES, compare
from validate.levels import Level, compare_graphs
from validate.report import make_report, render, verdict, write_report
from validate.scenarios import make_scenarios, random_tokens
from validate.tokens import LIMITS, compare_tokens

ROOT = Path(__file__).parents[1]
FAULTS = {
    "wrong scale": {"scale": 1.01},
    "mask one slot too far": {"mask": 1},
    "mask one slot too near": {"mask": -1},
    "keys and values swapped": {"swap": True},
    "cache written one slot late": {"late": 1},
    "weight of one layer disturbed": {"disturb": 1e-3},
    "not a number": {"nan": np.nan},
}


def graph(static: bool, **given) -> Graph:
    return graph_of(decoder_graph(static, **given), ROOT, "static" if static else "growing")


@pytest.fixture(scope="module")
def growing() -> Graph:
    return graph(static=False)


@pytest.fixture(scope="module")
def static() -> Graph:
    return graph(static=True)


def statuses(level: Level) -> set[str]:
    return {scenario.status for scenario in level.comparison.scenarios}


@pytest.mark.parametrize(("given", "within"), [({}, 1e-6), ({"last": True}, 1e-6), ({"dtype": np.float16}, 5e-3)])
def test_static_agrees_with_growing(growing, given, within):
    level = compare_graphs(growing, graph(static=True, **given))
    assert statuses(level) == {PASSED}
    assert level.comparison.worst.error <= within
    for scenario in level.comparison.scenarios:
        assert len(scenario.outputs) == 5  # logits, and key and value of two layers
        assert len(scenario.token_errors) == sum(scenario.step_tokens)


def test_float16_is_not_exact(growing):
    assert compare_graphs(growing, graph(static=True, dtype=np.float16), tolerance=1e-5).status == DIFFERENT


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_shows_in_every_scenario(growing, fault):
    assert statuses(compare_graphs(growing, graph(static=True, **fault))) == {DIFFERENT}


@pytest.mark.parametrize("static", [False, True])
def test_nan_is_a_difference_on_either_side_and_on_both(growing, static):
    broken = graph(static, nan=np.nan)
    for pair in ((growing, broken), (broken, growing), (broken, broken)):
        comparison = compare(*pair, make_scenarios(random_tokens(VOCAB, 0), None, None)[:1])
        assert comparison.status == DIFFERENT
        assert comparison.worst.problem == "not a number"


class BatchLeak(GrowingDecoder):
    """Forgets which positions of a batch are padding: right alone, wrong beside longer rows."""

    def step(self, tokens_BS, counts, alpha):
        return super().step(tokens_BS, np.full_like(counts, counts.max()), alpha)


class Leaking(Graph):
    def decoder(self, batch):
        decoder = super().decoder(batch)
        return BatchLeak(decoder.forward, decoder.pasts)


def test_leaks_between_the_rows_of_a_batch_are_a_difference(growing):
    leaking = Leaking(**{**vars(growing), "name": "leaking"})
    scenarios = make_scenarios(random_tokens(VOCAB, 0), None, None)
    found = {scenario.name: scenario.status for scenario in compare(growing, leaking, scenarios).scenarios}
    assert found["decode"] == PASSED
    assert found["ragged batch"] == found["different speeds"] == DIFFERENT
    assert compare(leaking, growing, scenarios).status == PASSED  # a reference runs its rows alone


class Partial(Graph):
    """Does not tell of its last cache."""

    @property
    def cache_names(self):
        return super().cache_names[:-1]


def test_an_output_that_one_side_lacks_is_a_difference(growing):
    partial = Partial(**{**vars(growing), "name": "partial"})
    scenarios = make_scenarios(random_tokens(VOCAB, 0), None, None)[:1]
    for pair, problem in (((growing, partial), "missing"), ((partial, growing), "only the candidate has it")):
        comparison = compare(*pair, scenarios)
        assert comparison.status == DIFFERENT
        assert (comparison.worst.output, comparison.worst.problem) == ("present.1.value", problem)


def test_a_static_cache_begins_full_of_noise(static):
    for cache in static.decoder(2).caches():
        assert cache.shape == (2, 2, CAPACITY, 8)
        assert np.abs(cache).mean() > 0.5
        assert not np.array_equal(cache[0], cache[1])


def test_a_step_that_fails_is_a_difference_and_says_where(growing):
    level = compare_graphs(growing, graph(static=True, late=1))
    failed = next(scenario for scenario in level.comparison.scenarios if scenario.name == "to the last slot")
    assert failed.status == DIFFERENT
    assert "present.0." in failed.reason  # the TensorScatter of the first layer
    assert "exceeds" in failed.reason


def test_what_a_small_cache_has_no_room_for_is_not_run(growing, static):
    scenarios = make_scenarios(random_tokens(VOCAB, 0), CAPACITY, trained_length=100)
    comparison = compare(growing, static, [each for each in scenarios if each.name == "beyond trained length"])
    assert comparison.status == NOT_RUN
    assert comparison.scenarios[0].reason == f"needs 133 cache slots, and there are {CAPACITY}"


def test_graphs_of_different_models_are_refused(growing):
    other = decoder_graph(static=True)
    other.graph.output[0].type.tensor_type.shape.dim[2].dim_value = VOCAB
    del other.graph.output[3:]
    del other.graph.input[5:]
    with pytest.raises(UserError):
        compare_graphs(growing, graph_of(other, ROOT, "one layer"))


def test_an_input_of_unknown_meaning_is_refused():
    model = decoder_graph(static=True)
    model.graph.input.append(onnx.helper.make_tensor_value_info("temperature", TensorProto.FLOAT, [1]))
    with pytest.raises(UserError, match="temperature"):
        graph_of(model, ROOT, "model.onnx")


# Scenarios


def test_alpha_goes_by_the_prompt_of_each_row():
    scenarios = {scenario.name: scenario for scenario in make_scenarios(random_tokens(VOCAB, 0), None, 24)}
    beyond = scenarios["beyond trained length"].steps
    assert beyond[0]["counts"].tolist() == [32, 20, 20]
    assert all(step["alpha"].tolist() == [3, 1, 1] for step in beyond)  # row 1 crosses 24 while decoding, and keeps 1
    assert [step["alpha"].tolist() for step in scenarios["chunked prompt"].steps] == [[3]] * 3  # of all 39 tokens


def test_scenarios_have_rows_that_wait_and_rows_that_start_late():
    scenarios = {scenario.name: scenario for scenario in make_scenarios(random_tokens(VOCAB, 0), 96, None)}
    counts = np.array([step["counts"] for step in scenarios["different speeds"].steps])
    assert counts[0, 1] == 0
    assert (counts == 0).any(axis=1).sum() >= 3
    assert (counts.max(axis=1) > counts.min(axis=1)).all()
    assert scenarios["to the last slot"].slots == 96
    assert all(step["final"] == (step is scenario.steps[-1]) for scenario in scenarios.values() for step in scenario.steps)


def test_positions_of_padding_stay_within_the_row():
    positions = positions_of(np.array([0, 5, 7, 0]), np.array([3, 1, 0, 0]), 3)
    assert positions.tolist() == [[0, 1, 2], [5, 5, 5], [6, 6, 6], [0, 0, 0]]


# bfloat16


@pytest.fixture(scope="module")
def bfloat16_files(tmp_path_factory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("bfloat16")
    files = {}
    for static in (False, True):
        files[static] = folder / f"{'static' if static else 'growing'}.onnx"
        model = decoder_graph(static, dtype=ml_dtypes.bfloat16)
        onnx.save(model, files[static], save_as_external_data=True, location=f"{static}.data", size_threshold=256)
    return files


def test_bfloat16_graphs_agree_as_float32_twins(bfloat16_files):
    level = compare_graphs(open_graph(bfloat16_files[False]), open_graph(bfloat16_files[True]))
    assert statuses(level) == {PASSED}
    assert level.comparison.tolerance == TOLERANCES[TensorProto.FLOAT]
    assert "twin" in level.notes[0]


def test_rounding_to_bfloat16_is_seen_and_tolerated(growing, bfloat16_files):
    level = compare_graphs(growing, open_graph(bfloat16_files[True]))
    assert level.status == PASSED
    assert 1e-3 < level.comparison.worst.error < level.comparison.tolerance == TOLERANCES[TensorProto.BFLOAT16]


def test_the_twin_leaves_weights_where_they_are(bfloat16_files):
    twin = float32_twin(onnx.load(bfloat16_files[True], load_external_data=False))
    external = [tensor for tensor in twin.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert {tensor.data_type for tensor in external} >= {TensorProto.BFLOAT16}
    assert not [tensor.name for tensor in twin.graph.initializer
                if tensor.data_type == TensorProto.BFLOAT16 and tensor not in external]  # fmt: skip
    assert {value.type.tensor_type.elem_type for value in twin.graph.output} == {TensorProto.FLOAT}


# Tokens


class Letters:
    """A tokenizer of one byte a token."""

    size = VOCAB

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(32 + token for token in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode()


TEXT = np.random.default_rng(3).integers(0, VOCAB, 400).tolist()


@pytest.mark.parametrize("last", [False, True])
def test_tokens_of_equal_graphs_agree(growing, last):
    found = compare_tokens(growing, graph(static=True, last=last), Letters(), TEXT, TensorProto.FLOAT)
    assert found.passed
    reading = found.readings[0]
    assert (reading.windows, reading.window) == (4, CAPACITY)
    assert reading.mean_kl < 1e-9
    assert reading.agreement == 1
    assert reading.candidate_bits == pytest.approx(reading.reference_bits, rel=1e-6)
    assert (found.continuation.identical, found.continuation.new_tokens) == (4, 32)


def test_bits_per_byte_are_those_of_the_text(growing):
    """A model whose logits are all equal needs log2(vocabulary) bits a token, here a byte."""
    model = decoder_graph(static=True)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    head.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, VOCAB), np.float32), "head"))
    flat = graph_of(model, ROOT, "flat")
    found = compare_tokens(growing, flat, Letters(), TEXT, TensorProto.FLOAT)
    assert found.readings[0].candidate_bits == pytest.approx(np.log2(VOCAB), rel=1e-5)
    assert found.readings[0].reference_bits != pytest.approx(np.log2(VOCAB), rel=1e-2)
    assert not found.passed


@pytest.mark.parametrize("fault", [{"disturb": 1}, {"scale": 1.5}, {"nan": np.nan}])
@pytest.mark.parametrize("dtype", LIMITS)
def test_tokens_of_a_damaged_graph_differ(growing, fault, dtype):
    assert not compare_tokens(growing, graph(static=True, **fault), Letters(), TEXT, dtype).passed


# Command line and report


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """A pipeline's folder as far as it goes without a checkpoint: an exported and a portable graph."""
    write(tmp_path / "export", decoder_graph(static=False))
    write(tmp_path / "surgery", decoder_graph(static=True))
    return tmp_path


def write(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"text": None, "tolerance": None, "seed": 0, "force": False, **given})


def test_a_pipeline_folder_gets_a_report(pipeline):
    assert validate_pipeline(pipeline, options()) == 0
    report = json.loads((pipeline / "validate" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["verdict"] == PASSED
    assert [level["status"] for level in report["levels"]] == [NOT_RUN, PASSED, NOT_RUN, NOT_RUN, NOT_RUN]
    assert all(level["reason"] for level in report["levels"] if level["status"] == NOT_RUN)
    html = (pipeline / "validate" / "report.html").read_text()
    assert all(level["title"].replace("'", "&#39;") in html for level in report["levels"])
    assert not re.search(r"src=|@import|url\((?!#)|<link|<script|href=\"(?!#)", html)  # needs nothing beside it


def test_the_report_shows_a_layer_before_and_after(pipeline):
    """Both pictures, and only those that surgery's manifest knows."""
    for when in ("before", "after"):
        (pipeline / "surgery" / f"{when}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg"><text>{when} it</text></svg>'
        )
    (pipeline / "surgery" / "report.json").write_text('{"unfused": []}')
    validate_pipeline(pipeline, options())
    assert "before it" not in (pipeline / "validate" / "report.html").read_text()
    manifest = {"outputs": {"before.svg": 0, "after.svg": 0}, "seconds": 1, "peak_memory_bytes": 1, "options": {}}
    (pipeline / "surgery" / "manifest.json").write_text(json.dumps(manifest))
    validate_pipeline(pipeline, options(force=True))
    html = (pipeline / "validate" / "report.html").read_text()
    assert all(f"<text>{when} it</text>" in html for when in ("before", "after"))


def test_run_results_are_polygraphys_and_small(pipeline):
    validate_pipeline(pipeline, options())
    files = sorted((pipeline / "validate" / "polygraphy").iterdir())
    assert [file.name for file in files] == [
        "2-chunked-prompt.json", "2-decode.json", "2-different-speeds.json", "2-prompt.json", "2-ragged-batch.json",
        "2-to-the-last-slot.json",
    ]  # fmt: skip
    exported, portable = RunResults.load(str(files[1])).values()
    assert len(exported) == len(portable) == 13
    assert exported[0].runner_name == "exported"
    assert bool(SimpleCompareFunc(atol=1e-4)(exported[-1], portable[-1])["logits"])
    for step in exported:
        assert all(value.nbytes <= SAVED_BYTES for value in step.values())


def test_a_difference_exits_1_also_when_up_to_date(pipeline, capsys):
    write(pipeline / "surgery", decoder_graph(static=True, disturb=1e-2))
    assert validate_pipeline(pipeline, options()) == 1
    assert json.loads((pipeline / "validate" / "report.json").read_text())["verdict"] == DIFFERENT
    capsys.readouterr()
    assert validate_pipeline(pipeline, options()) == 1
    assert "up to date, different" in capsys.readouterr().out
    write(pipeline / "surgery", decoder_graph(static=True))
    assert validate_pipeline(pipeline, options()) == 0


def test_nothing_run_is_not_passed(pipeline):
    (pipeline / "surgery" / "model.onnx").unlink()
    assert validate_pipeline(pipeline, options()) == 0
    report = json.loads((pipeline / "validate" / "report.json").read_text())
    assert report["verdict"] == NOT_RUN
    assert "passed" not in {level["status"] for level in report["levels"]}


def test_two_graphs_on_the_command_line(tmp_path):
    reference = write(tmp_path / "reference", decoder_graph(static=False))
    candidate = write(tmp_path / "candidate", decoder_graph(static=True, nan=np.nan))
    command = [sys.executable, "-m", "validate", reference, candidate, "--out", tmp_path / "out"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert "not a number" in found.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)["verdict"] == DIFFERENT
    assert "not a number" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/nowhere"], "has no export/model.onnx"),
        (["{folder}", "--text", "{folder}/none.txt"], "none.txt: no such file"),
        (["{folder}/export/model.onnx", "{folder}/nowhere.onnx"], "nowhere.onnx: no such file"),
        (["{folder}/export/model.onnx", "{folder}/broken.onnx"], "not an ONNX"),
    ],
)
def test_unusable_input_is_one_line(pipeline, arguments, says, monkeypatch):
    (pipeline / "broken.onnx").write_bytes(b"no protobuf at all")
    monkeypatch.setattr(sys, "argv", ["validate", *(each.format(folder=pipeline) for each in arguments)])
    with pytest.raises(UserError, match=says) as raised:
        main()
    assert "\n" not in str(raised.value)


def test_verdict_is_different_if_anything_is():
    def levels(*given: str) -> list[Level]:
        return [Level(number, "title", status) for number, status in enumerate(given, 1)]

    assert verdict(levels(PASSED, DIFFERENT, NOT_RUN)) == DIFFERENT
    assert verdict(levels(PASSED, NOT_RUN)) == PASSED
    assert verdict(levels(NOT_RUN)) == NOT_RUN


def test_a_report_of_damaged_tokens_can_be_read(growing, tmp_path):
    tokens = compare_tokens(growing, graph(static=True, nan=np.nan), Letters(), TEXT, TensorProto.FLOAT)
    report = make_report("damaged", [Level(5, "Tokens", DIFFERENT, tokens=tokens)], {}, 0.0)
    write_report(report, tmp_path)
    again = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert render(again) == (tmp_path / "report.html").read_text()
    assert "not a number" in render(again)


def test_text_in_the_report_is_escaped(growing, static):
    tokens = compare_tokens(growing, static, Letters(), TEXT, TensorProto.FLOAT)
    tokens.continuation.example["prompt"] = "<script>alert(1)</script>"
    html = render(make_report("<b>", [Level(5, "Tokens", PASSED, tokens=tokens)], {}, 0.0))
    assert "<script>" not in html
    assert "<b>" not in html.split("</title>")[0]

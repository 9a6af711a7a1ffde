"""validate/: that it passes what is right, and that each thing that can be wrong is reported as a difference."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from decoder_graphs import CAPACITY, VOCAB, decoder, decoder_graph
from onnx import TensorProto

from suture.core.errors import UserError
from suture.core.shadow_copy import float32_shadow_copy
from suture.core.step_inputs import positions_of
from suture.core.tolerances import REWRITTEN
from suture.runtime.decoders import GrowingDecoder
from suture.runtime.graphs import OnnxDecoder, graph_of, open_graph
from suture.runtime.network_decoder import open_network
from suture.validate.compare import DIFFERENT, NOT_RUN, PASSED, compare
from suture.validate.level import Level
from suture.validate.levels import compare_graphs
from suture.validate.scenarios import make_scenarios, random_tokens

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


def statuses(level: Level) -> set[str]:
    return {scenario.status for scenario in level.comparison.scenarios}


def test_an_input_that_no_step_has_is_refused(tmp_path):
    """By onnxruntime's side and by TensorRT's alike."""
    model = decoder_graph(static=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", TensorProto.FLOAT, [1]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("types", TensorProto.FLOAT, [1]))
    model.graph.node.append(onnx.helper.make_node("Neg", ["token_type_ids"], ["types"]))
    onnx.save(model, tmp_path / "model.onnx")
    for opened in (open_graph, open_network):
        with pytest.raises(UserError, match="has inputs of unknown meaning: token_type_ids"):
            opened(tmp_path / "model.onnx")


@pytest.mark.parametrize(("given", "within"), [({}, 1e-6), ({"last": True}, 1e-6), ({"dtype": np.float16}, 5e-3)])
@pytest.mark.seconds
def test_static_agrees_with_growing(growing, given, within):
    level = compare_graphs(growing, decoder(static=True, **given))
    assert statuses(level) == {PASSED}
    assert level.comparison.worst.error <= within
    for scenario in level.comparison.scenarios:
        assert len(scenario.outputs) == 5  # logits, and key and value of two layers
        assert len(scenario.token_errors) == sum(scenario.step_tokens)


@pytest.mark.seconds
def test_float16_is_not_exact(growing):
    assert compare_graphs(growing, decoder(static=True, dtype=np.float16), tolerance=1e-5).status == DIFFERENT


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.sample("cache*", "mask one slot too far", "not a number")
@pytest.mark.seconds
def test_a_fault_shows_in_every_scenario(growing, fault):
    assert statuses(compare_graphs(growing, decoder(static=True, **fault))) == {DIFFERENT}


@pytest.mark.parametrize("static", [False, True])
def test_nan_is_a_difference_on_either_side_and_on_both(growing, static):
    broken = decoder(static, nan=np.nan)
    for pair in ((growing, broken), (broken, growing), (broken, broken)):
        comparison = compare(*pair, make_scenarios(random_tokens(VOCAB, 0), None, None)[:1])
        assert comparison.status == DIFFERENT
        assert comparison.worst.problem == "not a number"


class BatchLeak(GrowingDecoder):
    """Forgets which positions of a batch are padding: right alone, wrong beside longer rows."""

    def step(self, tokens_BS, counts, alpha):
        return super().step(tokens_BS, np.full_like(counts, counts.max()), alpha)


class Leaking(OnnxDecoder):
    def decoder(self, batch):
        decoder = super().decoder(batch)
        return BatchLeak(decoder.forward, decoder.pasts)


@pytest.mark.seconds
def test_leaks_between_the_rows_of_a_batch_are_a_difference(growing):
    leaking = Leaking(**{**vars(growing), "name": "leaking"})
    scenarios = make_scenarios(random_tokens(VOCAB, 0), None, None)
    found = {scenario.name: scenario.status for scenario in compare(growing, leaking, scenarios).scenarios}
    assert found["decode"] == PASSED
    assert found["ragged batch"] == found["mixed batch"] == DIFFERENT
    assert compare(leaking, growing, scenarios).status == PASSED  # a reference runs its rows alone


class Partial(OnnxDecoder):
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


@pytest.mark.seconds
def test_a_step_that_fails_is_a_difference_and_says_where(growing):
    level = compare_graphs(growing, decoder(static=True, late=1))
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
    counts = np.array([step["counts"] for step in scenarios["mixed batch"].steps])
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


@pytest.mark.seconds
def test_bfloat16_graphs_agree_as_float32_shadow_copies(bfloat16_files):
    level = compare_graphs(open_graph(bfloat16_files[False]), open_graph(bfloat16_files[True]))
    assert statuses(level) == {PASSED}
    assert level.comparison.tolerance == REWRITTEN[TensorProto.FLOAT]
    assert "shadow copies" in level.notes[0]


def test_rounding_to_bfloat16_is_seen_and_tolerated(growing, bfloat16_files):
    level = compare_graphs(growing, open_graph(bfloat16_files[True]))
    assert level.status == PASSED
    assert 1e-3 < level.comparison.worst.error < level.comparison.tolerance == REWRITTEN[TensorProto.BFLOAT16]


def test_the_shadow_copy_leaves_weights_where_they_are(bfloat16_files):
    copy = float32_shadow_copy(onnx.load(bfloat16_files[True], load_external_data=False))
    external = [tensor for tensor in copy.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert {tensor.data_type for tensor in external} >= {TensorProto.BFLOAT16}
    assert not [tensor.name for tensor in copy.graph.initializer
                if tensor.data_type == TensorProto.BFLOAT16 and tensor not in external]  # fmt: skip
    assert {value.type.tensor_type.elem_type for value in copy.graph.output} == {TensorProto.FLOAT}

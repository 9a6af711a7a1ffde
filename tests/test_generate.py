"""generate: text from tiny-qwen, by every form of the graph; batches, second turns, endings."""

import json
from pathlib import Path

import build_graphs
import numpy as np
import pytest
from fake_engine import FakeEngine

from suture.core.signature import ntk_alpha
from suture.generate.batch import CAPACITY, LENGTH, STOP, Batch, Sequence
from suture.generate.command import in_order
from suture.generate.text import TextStream
from suture.models.tokenizer import open_tokenizer
from suture.runtime import graphs
from suture.runtime.engine import Engine
from suture.runtime.engine_decoder import EngineModel, signature_of
from suture.runtime.graphs import OnnxDecoder, graph_of, open_to_generate
from suture.serve.request import Sampling
from suture.serve.speed import Speed, _figure
from tests.golden.make_text import CHECKPOINT, GOLDEN, NEW_TOKENS

ROOT = Path(__file__).parents[1]
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))
TOKENIZER = open_tokenizer(CHECKPOINT)
PROMPTS = [TOKENIZER.encode(case["prompt"]) for case in CASES]
TRAINED = 256


@pytest.fixture(scope="module")
def static(tiny_portable) -> OnnxDecoder:
    return open_to_generate(tiny_portable / "model.onnx", "cpu")


@pytest.fixture(scope="module")
def growing(tiny_export) -> OnnxDecoder:
    return open_to_generate(tiny_export / "model.onnx", "cpu")


@pytest.fixture(params=["static", "growing"])
def model(request) -> OnnxDecoder:
    return request.getfixturevalue(request.param)


def sequences(prompts: list[list[int]], limits: list[int], stop: tuple[str, ...] = (), ends: frozenset = frozenset()):
    return [
        Sequence(index, prompt, limit, ends, TextStream(TOKENIZER.decode, stop))
        for index, (prompt, limit) in enumerate(zip(prompts, limits))
    ]


def batch(model: OnnxDecoder, rows: int, chunk: int = 64, vocab: int = TOKENIZER.size, **sampling) -> Batch:
    return Batch(model, rows, Sampling(**sampling), vocab, chunk, Speed())


def answers(batch: Batch, asked: list[Sequence]) -> list[list[int]]:
    return [sequence.answer for sequence in in_order(batch.run(iter(asked), lambda sequence, piece: None))]


def test_greedy_text_is_pytorchs(model):
    """Four of five rows at once, with the prompt beyond the trained length in chunks."""
    done = list(in_order(batch(model, 4).run(iter(sequences(PROMPTS, [NEW_TOKENS] * 5)), lambda sequence, piece: None)))
    assert [each.answer for each in done] == [case["tokens"] for case in CASES]
    assert [each.text.text for each in done] == [case["text"] for case in CASES]
    assert len(PROMPTS[-1]) > TRAINED


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.3}])
@pytest.mark.sample("static-sampling1", "growing-sampling0")
@pytest.mark.seconds
def test_rows_that_take_turns_give_what_each_gives_alone(model, sampling):
    prompts = [prompt[:length] for length in (3, 9, 1) for prompt in PROMPTS]
    limits = [1 + (7 * index) % 11 for index in range(len(prompts))]
    together = batch(model, 3, **sampling)
    found = answers(together, sequences(prompts, limits))
    assert [len(answer) for answer in found] == limits
    for index, (prompt, limit) in enumerate(zip(prompts, limits)):
        alone = Sequence(index, prompt, limit, frozenset(), TextStream(TOKENIZER.decode))
        assert answers_alone(model, alone, sampling) == found[index], index
    assert together.speed.written == sum(limits)
    assert together.speed.decoded == sum(limits) - len(limits)
    assert together.speed.steps < together.speed.decoded  # rows did go side by side
    assert len(together.speed.first) == len(limits)


def answers_alone(model: OnnxDecoder, sequence: Sequence, sampling: dict) -> list[int]:
    (done,) = batch(model, 1, **sampling).run(iter([sequence]), lambda sequence, piece: None)
    return done.answer


def test_results_come_in_the_order_they_were_asked(static):
    done = batch(static, 2).run(iter(sequences(PROMPTS, [20, 1, 5, 2, 9])), lambda sequence, piece: None)
    seen = [each.index for each in done]
    assert seen != sorted(seen)
    ordered = in_order(iter(sorted(sequences(PROMPTS, [1] * 5), key=lambda each: -each.index)))
    assert [each.index for each in ordered] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("first", [40, TRAINED - 30])
def test_a_second_turn_equals_one_long_prompt(model, first):
    """The second conversation grows beyond the trained length: another alpha, so nothing that was cached is right."""
    opened = PROMPTS[-1][:first]
    row = batch(model, 1)
    (answer,) = answers(row, sequences([opened], [12]))
    whole = [*opened, *answer, *PROMPTS[-1][first : first + 40]]
    same_alpha = ntk_alpha(first, TRAINED) == ntk_alpha(len(whole), TRAINED)
    assert same_alpha == (first == 40)
    fed = row.speed.read
    (continued,) = answers(row, sequences([whole], [NEW_TOKENS]))
    (anew,) = answers(batch(model, 1), sequences([whole], [NEW_TOKENS]))
    assert continued == anew
    assert row.speed.read - fed == (41 if same_alpha else len(whole))  # the first answer's last token was never fed
    assert row.speed.reused == (len(whole) - 41 if same_alpha else 0)


def test_a_prompt_that_differs_reuses_only_what_is_alike(static):
    row = batch(static, 1)
    answers(row, sequences([PROMPTS[1]], [5]))
    other = [*PROMPTS[1][:4], *PROMPTS[0]]
    (found,) = answers(row, sequences([other], [8]))
    assert found == answers(batch(static, 1), sequences([other], [8]))[0]
    assert row.speed.reused == 4
    answers(row, sequences([other], [1]))
    assert row.speed.reused == 4 + len(other) - 1  # the last token is fed again, for its logits


@pytest.mark.parametrize("stop", ["ort sys\nimp", "s\nfrom t", "\nimport unitt"])
def test_stop_words_across_tokens(static, stop):
    """Each lies in no single token."""
    text, tokens = CASES[0]["text"], CASES[0]["tokens"]
    assert not any(stop in TOKENIZER.decode([token]) for token in tokens)
    shown = []
    asked = sequences(PROMPTS[:1], [NEW_TOKENS], stop=("never said", stop))
    (done,) = batch(static, 1).run(iter(asked), lambda sequence, piece: shown.append(piece))
    assert done.finish == STOP
    assert "".join(shown) == done.text.text == text[: text.index(stop)]
    assert len(done.answer) < NEW_TOKENS


def test_a_token_that_ends_the_answer_is_no_part_of_it(static):
    tokens = CASES[0]["tokens"]
    last = tokens[5]
    (done,) = batch(static, 1).run(
        iter(sequences(PROMPTS[:1], [NEW_TOKENS], ends=frozenset([last]))), lambda sequence, piece: None
    )
    assert done.finish == STOP
    assert done.answer == tokens[: tokens.index(last) + 1]
    assert done.text.text == TOKENIZER.decode(tokens[: tokens.index(last)])


def test_the_cache_fills_to_its_last_slot(static):
    """640 slots: the token after the last one fed is still given, and the rows beside it are not disturbed, though a row
    that has ended takes part in their steps."""
    full = (PROMPTS[-1] * 3)[:640]
    asked = sequences([full, PROMPTS[0], full[:637]], [99, NEW_TOKENS, 99])
    done = list(in_order(batch(static, 2).run(iter(asked), lambda *_: None)))
    assert [(each.finish, len(each.answer)) for each in done] == [(CAPACITY, 1), (LENGTH, NEW_TOKENS), (CAPACITY, 4)]
    assert done[1].answer == CASES[0]["tokens"]


def test_ids_that_are_no_tokens_are_never_chosen(static):
    assert static.vocab > TOKENIZER.size
    found = answers(batch(static, 1, vocab=300), sequences(PROMPTS[:1], [NEW_TOKENS]))[0]
    assert max(found) < 300
    assert found != CASES[0]["tokens"]


def test_large_weights_stay_where_they_are(tiny_portable, monkeypatch):
    """Slower, but the same tokens."""
    seen = []
    monkeypatch.setattr(graphs, "is_large", lambda model: seen.append(model) or True)
    large = open_to_generate(tiny_portable / "model.onnx", "cpu")
    assert seen
    assert not large.layerwise
    assert answers(batch(large, 1), sequences(PROMPTS[:1], [NEW_TOKENS])) == [CASES[0]["tokens"]]


def test_an_engine_goes_through_the_same_loop(tmp_path):
    portable = build_graphs.portable_decoder()
    engine = Engine(tmp_path / "x", build_graphs.describe(portable), tmp_path, FakeEngine(portable), device="cpu")
    model = EngineModel("engine", signature_of(engine.description), engine)
    reference = graph_of(portable, tmp_path, "portable")
    assert model.largest_step == (4, 64)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, reference.vocab, length).tolist() for length in (5, 20, 1, 9)]
    found = [
        answers(batch(each, 3, chunk=16, vocab=reference.vocab), sequences(prompts, [8, 3, 12, 6]))
        for each in (reference, model)
    ]
    assert found[0] == found[1]
    assert len({tuple(answer) for answer in found[0]}) == 4


def test_a_summary_says_what_was_measured():
    speed = Speed(read=20, prompt_seconds=0.5, written=9, decoded=8, steps=4, decode_seconds=2.0, decode_bytes=6 * 10**9)
    speed.first = [0.1, 0.3]
    prompt, decode = speed.lines()
    assert "20 prompt tokens in 0.50 s (40.0 tokens/s)" in prompt
    assert "first token after 200 ms, on average" in prompt
    assert "9 tokens written in 2 answers; 4 decoding steps in 2.00 s: 4.00 tokens/s, 500 ms a step, 3.00 GB/s" in decode
    assert [_figure(value) for value in (1234.5, 99.94, 0.5, 0.0261, 0)] == ["1,234", "99.9", "0.500", "0.026", "0"]


def test_bytes_of_a_step_are_weights_and_valid_slots(static):
    row = batch(static, 2)
    row.speed.weight_bytes = 1_000_000
    answers(row, sequences(PROMPTS[:2], [3, 3]))
    slot = 4 * 2 * 256 * 4  # layers, key and value, heads · head_dim, bytes
    held = sum(len(prompt) + step for prompt in PROMPTS[:2] for step in (1, 2))
    assert row.speed.steps == 3  # the first sequence decodes once before the second's prompt is read
    assert row.speed.decode_bytes == 3 * 1_000_000 + held * slot

"""The scheduler: whatever the order of submit, cancel and tick, each request gets what it gets alone, and nothing is lost."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from decoder_graphs import CAPACITY as SLOTS
from decoder_graphs import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled import GREEDY, MODELS, Asked, Recorded, alone, finish, scheduler

from suture.serve import lookup
from suture.serve.engine import QueueFull, Scheduler
from suture.serve.request import CANCELLED, CAPACITY, FAILED, LENGTH, STOP, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLINGS = (
    GREEDY,
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=4),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
    Sampling(logit_bias=((5, 4.0), (9, -50.0))),
)
tokens = st.integers(0, 3)  # few, so that prompts often begin alike
requests = st.builds(
    Asked,
    st.one_of(
        st.lists(tokens, min_size=1, max_size=12).map(tuple),
        st.lists(tokens, min_size=SLOTS - 6, max_size=SLOTS).map(tuple),
    ),
    st.integers(1, 12),
    st.sampled_from(SAMPLINGS),
    st.none() | st.integers(0, VOCAB - 1),
)
actions = st.lists(
    st.one_of(
        requests.map(lambda asked: ("submit", asked)), st.tuples(st.just("cancel"), st.integers(0, 9)), st.just(("tick", 0))
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("kind", ["static", "growing"])
@settings(max_examples=20, deadline=None)
@given(
    script=actions,
    rows=st.integers(1, 5),
    chunk=st.sampled_from([1, 5, 40]),
    lag=st.integers(0, 1),
    guesses=st.sampled_from([0, 3]),
)
def test_any_interleaving_gives_each_request_what_it_gets_alone(kind, script, rows, chunk, lag, guesses):
    model = MODELS[kind]
    made, asked, given_up = scheduler(model, rows, chunk, lag=lag, guesses=guesses), [], []
    for action, value in script:
        if action == "submit":
            one = Asked(value.prompt, value.limit, value.sampling, value.stop)
            asked.append((one, one.request()))
            made.submit(asked[-1][1])
        elif action == "cancel" and asked:
            given_up.append(asked[value % len(asked)])
            made.cancel(given_up[-1][1])
        else:
            tick(made, chunk, guesses)
            assert all(request.finish for _, request in given_up)  # within a tick
    finish(made)
    for one, request in asked:
        answer, why = alone(model, one)
        assert len(one.why) == 1
        assert request.finish == one.why[0]
        if one.why == [CANCELLED]:
            assert (one, request) in given_up
            assert one.answer == answer[: len(one.answer)]
        else:
            assert (one.answer, one.why[0]) == (answer, why)
    assert_empty(made)


def tick(made: Recorded, chunk: int, guesses: int) -> None:
    """A tick takes at most one chunk of one prompt, then one decoding step, and every row that decodes gets a token."""
    decoding = {index: made.rows[index].request for index in made._decoding()}
    before = {request: made.rows[index].chosen for index, request in decoding.items()}
    made.steps.clear()
    made.tick()
    prompts = [width for name, width in made.steps if name == "advance" and width != 1 + guesses]
    assert len(made.steps) <= 2
    assert len(prompts) <= 2 if guesses else len(prompts) <= 1
    assert all(width <= max(chunk, 1 + guesses) for _, width in made.steps)
    for request, chosen in before.items():
        if not request.finish:
            row = made.rows[made.rows.of(request)]
            assert row.chosen > chosen or made.decoder.lengths[made.rows.of(request)] == made.model.longest


def assert_empty(made: Scheduler) -> None:
    assert not made.rows.used
    assert not made.waiting
    assert not made.pending
    assert not made.cancelled
    assert made.sampler.requests == [None] * len(made.sampler.requests)
    assert [len(made.rows[row].held) for row in range(len(made.decoder.lengths))] == made.decoder.lengths.tolist()
    if made.model.signature.static:
        assert made.decoder.ends.tolist() == made.decoder.lengths.tolist()


def drawn(count: int, seed: int = 0) -> list[Asked]:
    random = np.random.default_rng(seed)
    return [
        Asked(tuple(random.integers(0, VOCAB, random.integers(2, 32)).tolist()), int(random.integers(2, 60)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_are_near_their_bound(lag):
    """The bound on decoding steps: all rows busy in each. On rows computed: as many as tokens were decoded."""
    made, asked = scheduler(MODELS["static"], 8, chunk=16, lag=lag), drawn(64)
    for one in asked:
        made.submit(one.request())
    ticks = finish(made)
    speed = made.speed
    assert speed.decoded == sum(one.limit - 1 for one in asked)
    bound = math.ceil(speed.decoded / 8)
    assert speed.steps <= 1.15 * bound, (speed.steps, bound)
    assert ticks <= 1.15 * bound + 1
    assert speed.rows <= 1.15 * speed.decoded
    assert speed.read + speed.reused == sum(len(one.prompt) for one in asked)


def test_rows_in_use_move_to_the_front():
    made = scheduler(MODELS["static"], 8)
    asked = [Asked((1, 2, row), 40 if row == 7 else 12) for row in range(8)]
    for one in asked:
        made.submit(one.request())
    finish(made)
    assert [one.answer for one in asked] == [alone(made.model, one)[0] for one in asked]
    assert made.speed.rows < 8 * made.speed.steps / 2  # most steps have one row left
    assert made.decoder.step_rows(3) == 4


def test_what_prompts_have_in_common_is_read_once():
    """The requests come at once; the first one's tokens are copied to the rows of the others. A row that holds much is not
    taken where an empty one does."""
    made, system = scheduler(MODELS["static"], 4), tuple(range(10, 40))
    asked = [Asked((*system, row), 5) for row in range(3)]
    for one in asked:
        made.submit(one.request())
    finish(made)
    assert made.speed.read == len(system) + 3
    assert made.speed.reused == 2 * len(system)
    other = Asked((10, 11, 50), 3)
    made.submit(request := other.request())
    made.tick()
    assert request.reused == 2
    finish(made)
    assert other.answer == alone(made.model, other)[0]
    again = Asked((*system, 2, *asked[2].answer[:-1], 7), 4)
    made.submit(request := again.request())
    finish(made)
    assert request.reused == len(again.prompt) - 1
    assert again.answer == alone(made.model, again)[0]


def test_nothing_is_lost_or_kept_over_a_thousand_requests():
    made = scheduler(MODELS["static"], 4, queue=50, lag=1)
    random = np.random.default_rng(0)
    asked, refused, living = [], 0, []
    while len(asked) < 1000:
        one = Asked(tuple(random.integers(0, VOCAB, random.integers(1, 6)).tolist()), int(random.integers(1, 4)))
        request = one.request()
        try:
            made.submit(request)
        except QueueFull:
            refused += 1
            made.tick()
            continue
        asked.append(one)
        living.append(weakref.ref(request))
        if random.random() < 0.1:
            made.cancel(request)
    del request
    finish(made)
    assert refused > 0
    assert [len(one.why) for one in asked] == [1] * 1000
    assert {one.why[0] for one in asked} == {LENGTH, CANCELLED}
    assert all(len(one.told) == one.limit for one in asked if one.why == [LENGTH])
    assert_empty(made)
    gc.collect()
    assert sum(each() is not None for each in living) == 0


def test_an_answer_ends_with_its_reason():
    model = MODELS["static"]
    answer, _ = alone(model, Asked((1, 2, 3), 10))
    for one, why in (
        (Asked((1, 2, 3), 10, stop=answer[4]), STOP),
        (Asked((1, 2, 3), 5), LENGTH),
        (Asked(tuple(range(10)) * 9, 99), CAPACITY),
    ):
        made = scheduler(model, 2, lag=1)
        made.submit(one.request())
        finish(made)
        assert one.why == [why]
    assert len(one.told) == SLOTS - 90 + 1


def test_a_processor_sees_prompt_and_answer_and_decides():
    """Only even tokens; the rows beside it are not disturbed, and one that raises ends its own request."""
    seen = []

    def even(scores, prompt, answer):
        seen.append((list(prompt), list(answer)))
        return scores.masked_fill(torch.arange(len(scores)) % 2 == 1, -torch.inf)

    def broken(scores, prompt, answer):
        raise ValueError("no grammar")

    made = scheduler(MODELS["static"], 3, lag=1)
    masked, plain, failing = Asked((1, 2), 6), Asked((1, 2), 6), Asked((3,), 6)
    made.submit(masked.request(processors=[even]))
    made.submit(plain.request())
    made.submit(request := failing.request(processors=[broken]))
    finish(made)
    assert all(token % 2 == 0 for token in masked.answer)
    assert [len(answer) for _, answer in seen] == list(range(6))
    assert seen[-1] == ([1, 2], masked.answer[:-1])
    assert plain.answer == alone(made.model, plain)[0] != masked.answer
    assert failing.why == [FAILED]
    assert str(request.fault) == "no grammar"


def test_logprobs_come_with_the_tokens():
    made = scheduler(MODELS["static"], 2, lag=1)
    asked = Asked((1, 2), 4, Sampling(logprobs=3))
    made.submit(asked.request())
    finish(made)
    assert asked.answer == alone(made.model, Asked((1, 2), 4))[0]
    for token in asked.told:
        assert len(token.likeliest) == 3
        assert token.likeliest[0] == (token.id, token.logprob)  # the likeliest was chosen
        assert token.logprob < 0


def test_guesses_save_steps_and_change_nothing():
    """A prompt that repeats itself, with an answer that goes on so."""
    model = MODELS["static"]
    period = next(p for p in range(64) if len(set(alone(model, Asked((p,) * 8, 40))[0][-12:])) <= 4)
    asked = [Asked((period,) * 8, 40), Asked((period,) * 8, 40, Sampling(temperature=0.3, seed=1))]
    counts = {}
    for guesses in (0, 4):
        made = scheduler(model, 2, guesses=guesses)
        for one in asked:
            made.submit(Asked(one.prompt, one.limit, one.sampling).request())
        again = Asked(asked[1].prompt, 40, asked[1].sampling)
        made.submit(again.request())
        finish(made)
        assert again.answer == alone(model, again)[0]
        counts[guesses] = made.speed.steps
    assert made.speed.accepted > 0
    assert counts[4] < counts[0]


def test_what_lookup_guesses():
    assert lookup.guess([1, 2, 3, 4, 9, 9, 2, 3, 4], 3) == [9, 9, 2]
    assert lookup.guess([1, 2, 3], 3) == []
    assert lookup.accepted([5, 6, 7], [5, 6, 1, 0]) == [5, 6, 1]
    assert lookup.accepted([5], [5, 8]) == [5, 8]
    assert lookup.accepted([], [4, 0]) == [4]


def test_memory_is_what_the_caches_take():
    made = scheduler(MODELS["static"], 3)
    caches = sum(cache.nbytes for cache in made.decoder.caches())
    assert made.memory()["caches"] == caches

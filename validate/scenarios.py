"""What is asked of a decoder: each scenario is a list of steps that a server of language models would make."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from suture.core.signature import ntk_alpha

PADDING = 0  # any token: what padding computes is never looked at


@dataclass(frozen=True)
class Scenario:
    name: str
    what: str
    steps: list[dict[str, np.ndarray]] = field(repr=False)  # feeds of suture.validate.runners.DecoderRunner
    last_only: bool = False  # look at the logits of each step's last tokens only

    @property
    def slots(self) -> int:
        """The cache slots that it touches, those of padding among them."""
        lengths, most = 0, 0
        for step in self.steps:
            most = max(most, int(np.max(lengths)) + step["tokens"].shape[1])
            lengths = lengths + step["counts"]
        return most


def make_scenarios(
    tokens: Callable[[int], np.ndarray],
    capacity: int | None,
    trained_length: int | None,
    few_steps: bool = False,
    prefix: tuple[int, ...] = (),
) -> list[Scenario]:
    """`tokens(n)` gives n tokens to read. `capacity`: slots of the smaller static cache, where there is one.
    `trained_length`: of a model with dynamic NTK, whose behaviour changes beyond it. `few_steps`: for models whose every
    step takes long. `prefix`: what begins every row, beside the tokens that a scenario counts."""

    def scenario(name: str, what: str, prompt: list[list[int]], then: list[list[int]] | None = None) -> Scenario:
        """`prompt` and `then`: how many tokens each row adds at each step. alpha goes by the length of the prompt."""
        schedule = np.array(prompt + (then or []))
        rows = [np.array([*prefix, *tokens(total)], np.int64) for total in schedule.sum(axis=0)]
        first = (schedule > 0).argmax(axis=0), np.arange(len(rows))  # each row's first step that adds tokens
        schedule[first] += len(prefix)
        lengths = np.array(prompt).sum(axis=0)
        alphas = [ntk_alpha(int(n), trained_length) if trained_length else 1.0 for n in lengths]
        return Scenario(name, what, _steps(rows, schedule, np.array(alphas, np.float32)))

    if few_steps:
        return [
            scenario("prompt", "24 tokens at once", [[24]]),
            scenario("ragged batch", "prompts of 16 and 9 tokens padded on the right, then a token each", [[16, 9]], [[1, 1]]),
        ]  # fmt: skip
    scenarios = [
        scenario("prompt", "24 tokens at once", [[24]]),
        scenario("chunked prompt", "39 tokens in chunks of 16, 16 and 7", [[16], [16], [7]]),
        scenario("decode", "12 tokens, then 12 more one by one", [[12]], [[1]] * 12),
        scenario("ragged batch", "prompts of 24, 9 and 17 tokens padded on the right, then decoding",
                 [[24, 9, 17]], [[1, 1, 1]] * 6),
        scenario("mixed batch", "rows that decode beside rows that take a chunk, and rows that add nothing",
                 [[8, 0, 5], [1, 12, 0], [1, 1, 7], [0, 5, 1], [1, 0, 1], [6, 1, 1]]),
    ]  # fmt: skip
    if trained_length is not None:
        beyond = trained_length + max(8, trained_length // 4)
        what = f"prompts of {beyond}, {trained_length - 4} and 20 tokens, then decoding; trained on {trained_length}"
        prompt = [[beyond, trained_length - 4, 20]]
        scenarios.append(scenario("beyond trained length", what, prompt, [[1, 1, 1]] * 8))
    if capacity is not None:
        chunks = _chunks(capacity - 2 - len(prefix), 512)
        what = f"a prompt in chunks, then decoding until the cache's {capacity} slots are full"
        scenarios.append(replace(scenario("to the last slot", what, chunks, [[1]] * 2), last_only=True))
    return scenarios


def _chunks(total: int, most: int) -> list[list[int]]:
    return [[min(most, total - start)] for start in range(0, total, most)]


def _steps(rows: list[np.ndarray], schedule: np.ndarray, alpha: np.ndarray) -> list[dict[str, np.ndarray]]:
    done = np.zeros(len(rows), np.int64)
    steps = []
    for counts in schedule:
        tokens = np.full((len(rows), counts.max()), PADDING, np.int64)
        for row, (sequence, start, count) in enumerate(zip(rows, done, counts)):
            tokens[row, :count] = sequence[start : start + count]
        done += counts
        final = np.array(len(steps) == len(schedule) - 1)
        steps.append({"tokens": tokens, "counts": counts.astype(np.int64), "alpha": alpha, "final": final})
    return steps


def random_tokens(vocab: int, seed: int) -> Callable[[int], np.ndarray]:
    random = np.random.default_rng(seed)
    return lambda count: random.integers(0, vocab, count)


def text_tokens(ids: list[int], seed: int) -> Callable[[int], np.ndarray]:
    """Passages of a text, each from a place drawn at random; the text repeats where it is too short."""
    random = np.random.default_rng(seed)
    ids = np.array(ids, np.int64)
    return lambda count: np.take(ids, random.integers(0, len(ids)) + np.arange(count), mode="wrap")

"""What is asked of the scheduler: a prompt, how each token is chosen, and whom its tokens go to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

STOP, LENGTH, CAPACITY, CANCELLED, FAILED = "stop", "length", "capacity", "cancelled", "failed"  # why an answer ended

# scores [vocab] of the next token, the prompt and the answer so far -> scores; -inf: never
Processor = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The values stand for what OpenAI's and transformers' parameters of these names do."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # for tokens of prompt and answer
    presence_penalty: float = 0.0  # for tokens of the answer
    frequency_penalty: float = 0.0  # for each time that the answer has a token
    logit_bias: tuple[tuple[int, float], ...] = ()  # token, what is added to its logit
    logprobs: int | None = None  # the likeliest tokens that are told beside the chosen one
    seed: int | tuple[int, ...] = 0

    @property
    def looks_back(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    logprob: float | None = None  # where log-probabilities are asked for: of the model's own distribution
    likeliest: tuple[tuple[int, float], ...] = ()  # tokens and theirs


@dataclass(eq=False)
class GenerationRequest:
    """`take` is given each token of the answer, and returns True where the answer ends with it; `ended` is called once, with the
    reason. Both run in the thread that calls Scheduler.tick, and have to be quick."""

    prompt: Sequence[int]
    limit: int  # tokens of the answer, at least one
    take: Callable[[Token], bool]
    ended: Callable[[str], None]
    sampling: Sampling = Sampling()
    processors: Sequence[Processor] = ()
    answer: list[int] = field(default_factory=list)
    began: float | None = None  # when it got a row, by time.monotonic()
    reused: int = 0  # tokens of the prompt that the cache held already
    finish: str | None = None
    fault: Exception | None = None  # with FAILED: what `take` or a processor raised
    _draws: list[float] = field(default_factory=list, repr=False)

    def draw(self, place: int) -> float:
        """The random number in [0, 1) that the answer's token at `place` is drawn with: the request's own, so that no answer
        depends on those beside it."""
        if not self._draws:
            entropy = self.sampling.seed if isinstance(self.sampling.seed, int) else list(self.sampling.seed)
            self._random = np.random.default_rng(np.random.SeedSequence(entropy))
        while len(self._draws) <= place:
            self._draws.append(self._random.random())
        return self._draws[place]

"""From logits to the next token: transformers' logits processors in the order that its generate() has, then a draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids seen [B,n], scores [B,vocab] -> scores


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Sampler:
    """`vocab`: ids from there on pad the logits and are not tokens, so they are never chosen. `first`: logits processors of
    the model's own, which come before all others."""

    def __init__(self, sampling: Sampling, vocab: int, first: Sequence[Processor] = ()):
        self.sampling, self.vocab = sampling, vocab
        self.greedy = sampling.temperature == 0
        self.looks_back = bool(first) or sampling.repetition_penalty != 1
        self.processors = [*first, *_processors(sampling)]

    def draws(self, index: int, device: torch.device) -> torch.Generator:
        """The randomness of one sequence: its own, so that no sequence depends on those beside it in a batch."""
        seed = np.random.SeedSequence([self.sampling.seed, index]).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))

    def choose(self, logits_BV: torch.Tensor, seen: list[list[int]], draws: list[torch.Generator]) -> list[int]:
        """One token a row. `seen`: the tokens of each row so far, prompt included, which the penalty is for."""
        scores = logits_BV[:, : self.vocab].float()
        if self.processors:
            longest = max(map(len, seen), default=0)
            padded = [[*row, *row[:1] * (longest - len(row))] for row in seen]  # a token counts once, however often seen
            ids = torch.tensor(padded, device=scores.device)
            for process in self.processors:
                scores = process(ids, scores)
        if self.greedy:
            return scores.argmax(-1).tolist()
        probabilities = scores.softmax(-1)
        drawn = [torch.multinomial(row, 1, generator=draw) for row, draw in zip(probabilities, draws)]
        return torch.cat(drawn).tolist()


def _processors(sampling: Sampling) -> list[Processor]:
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return []
    from transformers.generation import logits_process  # here: it takes a second, and the likeliest token needs none of it

    found = []
    if sampling.repetition_penalty != 1:
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 0:
        found.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            found.append(logits_process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(logits_process.TopPLogitsWarper(sampling.top_p))
    return found

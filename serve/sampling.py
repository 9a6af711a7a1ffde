"""From logits to the next token, for all rows of a step at once and where the logits are.

The order is transformers': penalties, what is added to logits and processors, then temperature, top-k, top-p and min-p, then a
draw. A row's draw is one number in [0, 1) looked up in the cumulated probabilities, so it depends on no other row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from suture.serve.request import GenerationRequest, Token

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)  # columns of `values`


class Sampler:
    """`vocab`: ids from there on pad the logits and are not tokens, so they are never chosen."""

    def __init__(self, rows: int, vocab: int, device: str | torch.device = "cpu"):
        self.vocab, self.device = vocab, torch.device(device)
        self.requests: list[GenerationRequest | None] = [None] * rows
        self.values = torch.ones((rows, 6), device=self.device)
        self.top_k = torch.ones(rows, dtype=torch.int64, device=self.device)
        # Made where somebody asks for penalties or biases: how often a row's answer has each token, which its prompt has, ...
        self.counts: torch.Tensor | None = None
        self.prompted: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def begin(self, row: int, request: GenerationRequest) -> None:
        """The row is this request's from now on."""
        asked = request.sampling
        self.requests[row] = request
        values = [asked.temperature or 1.0, asked.top_p, asked.min_p,
                  asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty]  # fmt: skip
        self.values[row] = torch.tensor(values)
        self.top_k[row] = min(asked.top_k or self.vocab, self.vocab)
        if asked.looks_back and self.counts is None:
            shape = len(self.requests), self.vocab
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.prompted = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if asked.looks_back:
            self.counts[row] = 0
            self.prompted[row] = False
            ids = torch.tensor([token for token in request.prompt if token < self.vocab], dtype=torch.int64)
            self.prompted[row, ids.to(self.device)] = True
        if asked.logit_bias and self.bias is None:
            self.bias = torch.zeros((len(self.requests), self.vocab), device=self.device)
        if self.bias is not None:
            self.bias[row] = 0
            for token, added in asked.logit_bias:
                self.bias[row, token] = added

    def move(self, source: int, target: int) -> None:
        """The request of one row has gone to another one."""
        self.requests[source], self.requests[target] = None, self.requests[source]
        for values in (self.values, self.top_k, self.counts, self.prompted, self.bias):
            if values is not None:
                values[target] = values[source]

    def end(self, row: int) -> None:
        self.requests[row] = None

    def choose(self, logits_KV: torch.Tensor, first: int, places: Sequence[int | None]) -> torch.Tensor:
        """int64 [K]: the next token of rows first ... first+K-1, each at its place in the answer. Of rows that have none it means
        nothing. With penalties the tokens count as chosen."""
        rows = slice(first, first + len(logits_KV))
        requests = [None if place is None else each for each, place in zip(self.requests[rows], places)]
        scores = self._processed(logits_KV[:, : self.vocab].float(), rows, requests)
        chosen = scores.argmax(-1)
        if any(each and each.sampling.temperature for each in requests):
            chosen = self._drawn(scores, chosen, rows, requests, places)
        if self.counts is not None:
            counted = torch.tensor([each is not None for each in requests], dtype=torch.int32)
            self.counts[rows].scatter_add_(1, chosen[:, None], counted.to(self.device, non_blocking=True)[:, None])
        return chosen

    def _processed(self, scores: torch.Tensor, rows: slice, requests: list[GenerationRequest | None]) -> torch.Tensor:
        values = self.values[rows]
        if any(each and each.sampling.looks_back for each in requests):
            counts = self.counts[rows]
            said = counts > 0
            penalty = values[:, REPETITION, None]
            seen = (said | self.prompted[rows]) & (penalty != 1)
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
            scores = scores - values[:, FREQUENCY, None] * counts - values[:, PRESENCE, None] * said
        if any(each and each.sampling.logit_bias for each in requests):
            scores = scores + self.bias[rows]
        for place, request in enumerate(requests):
            if request and request.processors and not request.finish:
                scores = scores.clone()
                scores[place] = _by_its_own(request, scores[place])
        return scores

    def _drawn(
        self, scores, likeliest, rows: slice, requests: list[GenerationRequest | None], places: Sequence[int | None]
    ) -> torch.Tensor:
        values, asked = self.values[rows], [each.sampling for each in requests if each and each.sampling.temperature]
        scores = scores / values[:, TEMPERATURE, None]
        if most := max((each.top_k for each in asked), default=0):
            most = min(most, self.vocab)
            limits = self.top_k[rows]
            least = scores.topk(most).values.gather(1, (limits.clamp(max=most) - 1)[:, None])
            scores = scores.masked_fill((scores < least) & (limits < self.vocab)[:, None], -torch.inf)
        probabilities = scores.double().softmax(-1)
        if any(each.top_p < 1 for each in asked):
            falling, order = probabilities.sort(descending=True, stable=True)
            kept = (falling.cumsum(-1) - falling < values[:, TOP_P, None]) | (values[:, TOP_P, None] == 1)
            probabilities = probabilities * torch.zeros_like(kept).scatter(1, order, kept)
        if any(each.min_p for each in asked):
            least = values[:, MIN_P, None] * probabilities.max(-1, keepdim=True).values
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        numbers = [each.draw(place) if each else 0.0 for each, place in zip(requests, places)]
        cumulated = probabilities.cumsum(-1)
        drawn = torch.from_numpy(np.array(numbers)).to(self.device, non_blocking=True)[:, None] * cumulated[:, -1:]
        found = torch.searchsorted(cumulated, drawn, right=True)[:, 0]
        draws = torch.tensor([bool(each and each.sampling.temperature) for each in requests]).to(self.device, non_blocking=True)
        return torch.where(draws & (found < self.vocab), found, likeliest)


def _by_its_own(request: GenerationRequest, scores_V: torch.Tensor) -> torch.Tensor:
    """The scores as the request's processors leave them. What one of them raises is the request's fault, and no other's."""
    try:
        for process in request.processors:
            scores_V = process(scores_V, request.prompt, request.answer)
    except Exception as fault:
        request.fault = fault
    return scores_V


def told(logits_V: torch.Tensor, chosen: int, likeliest: int, vocab: int) -> Token:
    """The chosen token with its log-probability, and as many of the likeliest with theirs."""
    logprobs = logits_V[:vocab].float().log_softmax(-1)
    values, ids = logprobs.topk(min(likeliest, vocab)) if likeliest else (logprobs[:0], logprobs[:0].long())
    return Token(chosen, float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist())))

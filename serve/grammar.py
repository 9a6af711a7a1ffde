"""Answers in a JSON schema: llguidance says which tokens may come next. It is optional."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.tokenizer import Tokenizer
from suture.serve.request import Processor

MakeGrammar = Callable[[dict[str, Any]], Processor]


def grammars(tokenizer: Tokenizer | LibraryTokenizer) -> MakeGrammar | None:
    """What makes a processor of a JSON schema, and raises ValueError for one that llguidance does not take. None without
    llguidance."""
    try:
        import llguidance
        import llguidance.hf
        import llguidance.tiktoken
        import llguidance.torch
    except ImportError:
        return None
    if isinstance(tokenizer, Tokenizer):
        known = llguidance.tiktoken.lltokenizer_from_encoding(tokenizer._bpe, eos_token=tokenizer.end_of_text)
    else:
        known = llguidance.hf.from_tokenizer(tokenizer.tokenizer)

    def make(schema: dict[str, Any]) -> Processor:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_flexible": False})
        if wrong := llguidance.LLMatcher.validate_grammar(grammar, known):
            raise ValueError(wrong.splitlines()[0])
        matcher, taken = llguidance.LLMatcher(known, grammar), 0
        mask = llguidance.torch.allocate_token_bitmask(1, known.vocab_size)

        def allow(scores_V: torch.Tensor, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
            nonlocal taken
            for token in answer[taken:]:
                matcher.consume_token(token)
            taken = len(answer)
            llguidance.torch.fill_next_token_bitmask(matcher, mask, 0)
            bits = (mask[0][:, None] >> torch.arange(32)) & 1
            allowed = torch.zeros(len(scores_V), dtype=torch.bool)
            size = min(len(scores_V), bits.numel())
            allowed[:size] = bits.reshape(-1)[:size].bool()
            return scores_V.masked_fill(~allowed.to(scores_V.device), -torch.inf)

        return allow

    return make

"""Prompt lookup: what came after the last tokens when they last occurred in prompt or answer, as a guess at what comes next."""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that have to be alike


def guess(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens, often none."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        end = list(tokens[-size:])
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start] == end[0] and list(tokens[start : start + size]) == end:
                return list(tokens[start + size : start + size + most])
    return []


def accepted(guessed: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Of the tokens that were chosen at each place of a guess and behind it, those that hold: all up to the first that is
    another than the guess, which is right itself."""
    same = next((place for place, (ours, theirs) in enumerate(zip(guessed, chosen)) if ours != theirs), len(guessed))
    return list(chosen[: same + 1])

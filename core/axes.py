"""Names of axes that follow from other axes: 8*height of a picture whose latents have height, height/2 below, past + sequence.

A name is a sum of terms; a term is a number, or another name, multiplied by a number in front or divided by one behind.
"""

import math
import re
from collections.abc import Iterable, Mapping

TERM = re.compile(r"(?:(?P<times>[1-9]\d*)\*)?(?P<name>[A-Za-z_][\w.]*)(?:/(?P<by>[1-9]\d*))?|(?P<number>\d+)")


def length(name: str, lengths: Mapping[str, int]) -> int | None:
    """The length of an axis of this name, from those of other names. None where it does not follow from them."""
    if name in lengths:
        return lengths[name]
    total = 0
    for term in _terms(name):
        if term["number"] is not None:
            total += int(term["number"])
        elif term["name"] in lengths and term["name"] != name:
            total += int(term["times"] or 1) * lengths[term["name"]] // int(term["by"] or 1)
        else:
            return None
    return total or None


def solved(name: str, size: int) -> tuple[str, int] | None:
    """The other name that this one follows from alone, and its length where an axis of this name has the length `size`."""
    terms = _terms(name)
    if len(terms) != 1 or terms[0]["name"] in (None, name):
        return None
    return terms[0]["name"], size * int(terms[0]["by"] or 1) // int(terms[0]["times"] or 1)


def names(name: str) -> list[str]:
    """Those that it follows from; itself alone where it follows from none."""
    return [term["name"] for term in _terms(name) if term["name"] is not None] or [name]


def divisors(axes: Iterable[str]) -> dict[str, int]:
    """By name, what its length is a multiple of, so that all of `axes` are whole."""
    found: dict[str, int] = {}
    for term in (term for axis in axes for term in _terms(axis)):
        if term["name"] is not None:
            found[term["name"]] = math.lcm(found.get(term["name"], 1), int(term["by"] or 1))
    return found


def _terms(name: str) -> list[re.Match[str]]:
    """[] where the name is not of this form."""
    found = [TERM.fullmatch(part.strip()) for part in name.split("+")]
    return [term for term in found if term] if all(found) else []

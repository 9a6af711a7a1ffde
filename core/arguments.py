"""Values of a command line: argparse converters, so that what is not a usable value ends the command with one line that
names the option, before anything is read. Every option that takes more than a word or a path has one of them.
"""

import argparse
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

Container = argparse._ActionsContainer  # what options can be added to: a parser, or a group of one
SLOTS = 1 << 24  # of a cache, and tokens of a step: far beyond any model's positions, and what float32 still counts exactly
ROWS = 65_535  # of a batch: a CUDA grid's second dimension
TOKENS = (1 << 31) - 1
LAYERS = 10_000


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{_brief(text)} is not a whole number; it must be at least {least}") from None
        return _within(number, least, most, text)

    return convert


def real(least: float, most: float, or_zero: bool = False) -> Callable[[str], float]:
    """A number from `least` to `most`, both finite; 0 too with `or_zero`. Neither NaN nor infinity is one."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{_brief(text)} is not a number") from None
        if or_zero and number == 0:
            return 0.0
        if not math.isfinite(number):
            raise ArgumentTypeError(f"must be at least {least:g} and at most {most:g}, and {_brief(text)} is not finite")
        return _within(number, least, most, text)

    return convert


count = whole(1, TOKENS)
slots = whole(1, SLOTS)
rows = whole(1, ROWS)
port = whole(0, 65_535)
seed = whole(0, (1 << 63) - 1)
tolerance = real(1e-12, 1.0)  # of the largest value: beyond 1 nothing is compared, and at 0 no float is equal


def pattern(text: str) -> str:
    """A regular expression, as it was given."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentTypeError(f"{_brief(text)} is not a regular expression ({error})") from None
    return text


def capability(text: str) -> str:
    """A GPU's compute capability, such as 8.9."""
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", text):
        raise ArgumentTypeError(f"{_brief(text)} is not a compute capability, such as 8.9")
    return text


def size(text: str) -> tuple[int, int]:
    """HxW, in pixels."""
    height, _, width = text.lower().partition("x")
    if not all(each.isascii() and each.isdigit() and 0 < int(each) <= 1 << 14 for each in (height, width)):
        raise ArgumentTypeError(f"{_brief(text)} is not a size; write HEIGHTxWIDTH in pixels, such as 512x512")
    return int(height), int(width)


def frames(text: str) -> tuple[int, int] | str:
    """N or FIRST-LAST, from 0, as the first and last; "all" and "canonical" as they are."""
    if text in ("all", "canonical"):
        return text
    first, _, last = text.partition("-")
    last = last if "-" in text else first
    if not all(re.fullmatch(r"[0-9]{1,7}", each, re.ASCII) for each in (first, last)) or int(last) < int(first):
        raise ArgumentTypeError(f"{_brief(text)} is no frame; write a number from 0, FIRST-LAST, all or canonical")
    return int(first), int(last)


def point(text: str) -> tuple[float, float]:
    """X,Y, in pixels."""
    x, y = _pixels(text, 2, "a point; write X,Y in pixels, such as 120,80")
    return x, y


def box(text: str) -> tuple[float, float, float, float]:
    """LEFT,TOP,RIGHT,BOTTOM, in pixels."""
    left, top, right, bottom = _pixels(text, 4, "a box; write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 20,30,120,80")
    return left, top, right, bottom


def _pixels(text: str, count: int, what: str) -> tuple[float, ...]:
    numbers = text.split(",")
    if len(numbers) != count or not all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", number, re.ASCII) for number in numbers):
        raise ArgumentTypeError(f"{_brief(text)} is not {what}")
    return tuple(map(float, numbers))


def pair(text: str) -> str:
    """ONE=OTHER, as it was given."""
    one, equals, other = text.partition("=")
    if not (one and equals and other):
        raise ArgumentTypeError(f"{_brief(text)} is no pair; write it as tokens=NAME or the like")
    return text


def _within(number, least, most, text: str):
    if number < least:
        raise ArgumentTypeError(f"{_brief(text)} is too small; it must be at least {least}")
    if number > most:
        raise ArgumentTypeError(f"{_brief(text)} is too large; it must be at most {most}")
    return number


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")

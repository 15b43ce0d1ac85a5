"""Patterns of a shell, and the parts of a text that they take."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase

BRACES = re.compile(r"\{([^{}]*)\}")
WILD = re.compile(r"[*?\[]")
MOST_ALTERNATIVES = 10_000
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def matches(text: str, pattern: str) -> bool:
    """Whether a pattern of the shell takes the whole text.

    >>> matches("npu0", "np*"), matches("*", "[*]")
    (True, True)
    """
    return fnmatchcase(text, pattern)


def without_start(text: str, pattern: str, longest: bool) -> str:
    """The text without the shortest or the longest start that a pattern takes.

    >>> without_start("a/b/c", "*/", longest=False), without_start("a/b/c", "*/", longest=True)
    ('b/c', 'c')
    """
    ends = range(len(text) + 1)
    taken = [end for end in ends if matches(text[:end], pattern)]
    if not taken:
        return text
    return text[taken[-1 if longest else 0] :]


def without_end(text: str, pattern: str, longest: bool) -> str:
    """The text without the shortest or the longest end that a pattern takes.

    >>> without_end("a.b.c", ".*", longest=False), without_end("a.b.c", ".*", longest=True)
    ('a.b', 'a')
    """
    starts = range(len(text) + 1)
    taken = [start for start in starts if matches(text[start:], pattern)]
    if not taken:
        return text
    return text[: taken[0 if longest else -1]]


def replaced(text: str, pattern: str, new: str, every: bool) -> str:
    """The text with the first, or every, longest part that a pattern takes replaced. `#` and `%` before a pattern bind
    it to the start and the end.

    >>> replaced("a-b-c", "-", "_", every=True), replaced("a-b", "[ab]", "x", every=False)
    ('a_b_c', 'x-b')
    >>> replaced("aa", "%a", "", every=False)
    'a'
    """
    if not pattern:
        return text
    if pattern[0] in "#%":
        cut = without_start if pattern[0] == "#" else without_end
        kept = cut(text, pattern[1:], longest=True)
        if kept == text:
            return text
        return new + kept if pattern[0] == "#" else kept + new
    if not WILD.search(pattern):
        return text.replace(pattern, new, -1 if every else 1)
    parts, start = [], 0
    while start < len(text):
        end = _end_of(text, start, pattern)
        if end is None:
            parts.append(text[start])
            start += 1
            continue
        parts.append(new)
        start = end
        if not every:
            break
    return "".join([*parts, text[start:]])


def _end_of(text: str, start: int, pattern: str) -> int | None:
    """Where the longest part from `start` ends that a pattern takes; None if it takes none."""
    ends = range(len(text), start, -1)
    return next((end for end in ends if matches(text[start:end], pattern)), None)


def alternatives(text: str) -> list[str] | None:
    """The texts that `{a,b}` and `{1..3}` stand for; None if the text has none of them, or too many.

    >>> alternatives("x{a,b}{1..2}"), alternatives("{}"), alternatives("{a}")
    (['xa1', 'xa2', 'xb1', 'xb2'], None, None)
    """
    if math.prod(len(_values(values)) or 1 for values in BRACES.findall(text)) > MOST_ALTERNATIVES:
        return None
    for found in BRACES.finditer(text):
        if values := _values(found[1]):
            texts = [f"{text[: found.start()]}{value}{text[found.end() :]}" for value in values]
            below = [alternatives(each) or [each] for each in texts]
            return [each for several in below for each in several]
    return None


def _values(text: str) -> list[str]:
    if "," in text:
        return text.split(",")
    numbers = RANGE.fullmatch(text)
    if numbers is None or max(map(len, numbers.groups())) > 4:
        return []
    first, last = map(int, numbers.groups())
    step = 1 if first <= last else -1
    return [str(number) for number in range(first, last + step, step)]

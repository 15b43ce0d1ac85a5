"""Grade-school word problems in GSM8K's format, made on the spot, in four levels of difficulty.

| level | steps | templates | quantities | multipliers | train problems | held-out problems |
|-------|-------|-----------|------------|-------------|----------------|-------------------|
| 1     | 1     | 4         | 2–9        | 2–5         | 7,168          | 1,024             |
| 2     | 2     | 6         | 2–9        | 2–5         | 86,016         | 12,288            |
| 3     | 2     | 8         | 2–20       | 2–9         | 161,728        | 23,104            |
| 4     | 3     | 6         | 2–50       | 2–9         | 6,453,888      | 921,984           |

Counts are of distinct problems. A number that has to fit, such as the 12 of "12 apples shared among 3
friends", is worked out from operands in these ranges and may be larger. Every number of every problem is an
integer of at least 2, which keeps all plurals right.

A problem is its template, its things, its operands and its name. A stable hash of the first three picks the
one name that is held out for them; the other seven names make training problems. So no problem is in both
splits, whatever the seed. What is held out is the problem, not the arithmetic: 3 + 4 is met in both.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from grpo.word_problem_templates import LEVELS, NAMES, THINGS, Template

SPLITS = ("train", "heldout")


def word_problems(split: str, levels: Sequence[int], seed: int = 0, *, count: int = 20_000) -> list[dict[str, Any]]:
    """Distinct word problems with the keys `question`, `answer`, `level` and `id`.

    Levels take turns, and within a level its templates do. Problem i depends on (split, levels, seed) and i
    alone, not on `count`. Fewer than `count` come back where the smallest level has no more (see
    `count_problems`). Raises ValueError for an unknown split or level.

    >>> problem = word_problems("train", [2], count=1)[0]
    >>> problem["question"]
    'Henry has 5 stamps. He buys 4 bags of 8 stamps. How many stamps does Henry have now?'
    >>> problem["answer"]
    'The bags hold 4 * 8 = 32 stamps.\\nNow there are 5 + 32 = 37 stamps.\\n#### 37'
    >>> problem["id"]
    'word_problems/2/buys_bags/Henry-stamps-4-8-5'
    """
    if split not in SPLITS:
        raise ValueError(f"word_problems has no split {split!r}; use one of {', '.join(SPLITS)}")
    if not levels or set(levels) - set(LEVELS) or len(set(levels)) < len(levels):
        raise ValueError(f"word_problems cannot make levels={list(levels)}; name each of {list(LEVELS)} at most once")
    if count < 1:
        raise ValueError(f"word_problems cannot make {count} problems; ask for 1 or more")
    rounds = zip(*(_problems(split, level, seed) for level in levels), strict=False)
    return list(islice(chain.from_iterable(rounds), count))


def count_problems(split: str, level: int) -> int:
    """Distinct problems of a level: its templates take turns, so the one with the fewest sets the count.

    >>> count_problems("heldout", 1)
    1024
    """
    templates = LEVELS[level].templates
    return len(templates) * min(_num_cards(split, level, template) for template in templates)


def heldout_name(template: str, things: str, operands: Sequence[int]) -> str:
    """The one name whose problem with this content is held out, on every machine and for every seed."""
    content = f"{template}/{things}/{','.join(map(str, operands))}"
    return NAMES[hashlib.sha256(content.encode()).digest()[0] % len(NAMES)]


def _problems(split: str, level: int, seed: int) -> Iterator[dict[str, Any]]:
    """All problems of a level in the order of the seed, until one of its templates has no more."""
    templates = LEVELS[level].templates
    orders = (
        _shuffled(_num_cards(split, level, template), f"{split}/{level}/{template.name}/{seed}")
        for template in templates
    )
    for cards in zip(*orders, strict=False):
        for template, card in zip(templates, cards, strict=True):
            yield _problem(split, level, template, card)


def _num_cards(split: str, level: int, template: Template) -> int:
    contents = len(THINGS) * math.prod(map(len, LEVELS[level].operand_ranges(template)))
    return contents if split == "heldout" else contents * (len(NAMES) - 1)


def _problem(split: str, level: int, template: Template, card: int) -> dict[str, Any]:
    """Problem number `card` of a template: the number's mixed-radix digits are things, operands, name."""
    card, digit = divmod(card, len(THINGS))
    things = THINGS[digit]
    operands = []
    for values in LEVELS[level].operand_ranges(template):
        card, digit = divmod(card, len(values))
        operands.append(values[digit])
    name = heldout_name(template.name, things, operands)
    if split == "train":
        name = [other for other in NAMES if other != name][card]
    question, answer = template.render(operands, name, things)
    problem_id = f"word_problems/{level}/{template.name}/{name}-{things}-{'-'.join(map(str, operands))}"
    return {"question": question, "answer": answer, "level": level, "id": problem_id}


def _shuffled(size: int, key: str) -> Iterator[int]:
    """0 … size − 1 in random order (Fisher–Yates); work and memory grow with what is taken, not with size."""
    rng = random.Random(key)
    moved: dict[int, int] = {}
    for position in range(size):
        chosen = rng.randrange(position, size)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(position, position)

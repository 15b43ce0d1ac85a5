"""Grade-school word problems in GSM8K's format, made on the spot, in four levels of difficulty.

| level | steps | templates | quantities | multipliers | train problems | held-out problems |
|-------|-------|-----------|------------|-------------|----------------|-------------------|
| 1     | 1     | 4         | 2–9        | 2–5         | 6,912          | 1,280             |
| 2     | 2     | 6         | 2–9        | 2–5         | 85,632         | 12,288            |
| 3     | 2     | 8         | 2–20       | 2–9         | 165,888        | 18,944            |
| 4     | 3     | 6         | 2–50       | 2–9         | 6,445,824      | 930,048           |

Counts are of distinct problems. A number that has to fit, such as the 12 of "12 apples shared among 3
friends", is worked out from operands in these ranges and may be larger. Every number of every problem is an
integer of at least 2, which keeps all plurals right. Solutions of levels 1 and 2 first repeat what is given, so that a
policy copies before it computes; with the tokenizer of the `tiny` preset they have 24 to 41 tokens.

The numbers of its question decide whether a problem is held out, whatever its template, name, things, level and
seed. So the numbers of a held-out problem are never trained on, not even in another order or another story.
Its single equations may be: 3 + 4 = 7 can be one step of a training problem that has a third number.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from rewards.data.word_problem_templates import LEVELS, NAMES, THINGS, Template

SPLITS = ("train", "held_out")
SALT = 256  # of the first 300, it spreads the held-out numbers most evenly over the templates of levels 1 and 2


def word_problems(split: str, levels: Sequence[int], seed: int = 0, *, count: int = 20_000) -> list[dict[str, Any]]:
    """Distinct word problems with the keys `question`, `answer`, `level` and `id`.

    Levels take turns, and within a level its templates do. Problem i depends only on (split, levels, seed) and
    i, not on `count`. The list is shorter than `count` where the smallest level has no more. Raises ValueError
    for an unknown split or level.

    >>> problem = word_problems("train", [2], count=1)[0]
    >>> print(problem["question"], problem["answer"], sep="\\n")
    Frank has 9 marbles. He buys 4 bags of 2 marbles. How many marbles does Frank have now?
    Frank has 9 marbles at first and buys 4 bags of 2 marbles.
    The bags hold 4 * 2 = 8 marbles.
    Now there are 9 + 8 = 17 marbles.
    #### 17
    >>> problem["id"]
    'word_problems/2/buys_bags/Frank-marbles-4-2-9'
    """
    if split not in SPLITS:
        raise ValueError(f"word_problems has no split {split!r}; use one of {', '.join(SPLITS)}")
    if not levels or set(levels) - set(LEVELS) or len(set(levels)) < len(levels):
        raise ValueError(f"word_problems cannot make levels={list(levels)}; name each of {list(LEVELS)} at most once")
    if count < 1:
        raise ValueError(f"word_problems cannot make {count} problems; ask for 1 or more")
    rounds = zip(*(_problems(split, level, seed) for level in levels), strict=False)
    return list(islice(chain.from_iterable(rounds), count))


def is_held_out(numbers: Iterable[int]) -> bool:
    """Tells whether the problems whose questions give these numbers, in any order, are held out: about one in eight.

    The answer is the same for every template, name and thing, for every level and seed, and on every machine.
    """
    content = f"{SALT}:{','.join(map(str, sorted(numbers)))}"
    return hashlib.sha256(content.encode()).digest()[0] % 8 == 0


def shared_with_training(train: Iterable[str], held_out: Iterable[str]) -> tuple[int, int]:
    """Counts the held-out problems that have a template, and those that have the numbers, of a training problem, by id.

    The numbers are those of the question, in any order, whatever the template.

    >>> shared_with_training(["word_problems/1/buys/Ben-pens-2-3"], ["word_problems/1/buys/Anna-toys-3-4"])
    (1, 0)
    """
    templates, numbers = (set(kinds) for kinds in zip(*map(_template_and_numbers, train), strict=True))
    contents = [_template_and_numbers(problem_id) for problem_id in held_out]
    return sum(template in templates for template, _ in contents), sum(drawn in numbers for _, drawn in contents)


def _template_and_numbers(problem_id: str) -> tuple[str, tuple[int, ...]]:
    _, level, name, content = problem_id.split("/")
    template = next(template for template in LEVELS[int(level)].templates if template.name == name)
    numbers = template.numbers([int(operand) for operand in content.split("-")[2:]])
    return name, tuple(sorted(numbers[letter] for letter in template.asked))


def _problems(split: str, level: int, seed: int) -> Iterator[dict[str, Any]]:
    """All problems of a level in the order of the seed, until one of its templates has no more."""
    templates = LEVELS[level].templates
    orders = (_of_template(split, level, template, seed) for template in templates)
    for problems in zip(*orders, strict=False):
        yield from problems


def _of_template(split: str, level: int, template: Template, seed: int) -> Iterator[dict[str, Any]]:
    """The template's problems that are in the split. Problem number `card` has its mixed-radix digits as parts."""
    drawn_by = split.replace("_", "")  # problems are drawn by the word `heldout`; another word would draw others
    seeded = f"{drawn_by}/{level}/{template.name}/{seed}"
    parts = [THINGS, NAMES, *LEVELS[level].operand_ranges(template)]
    for card in _shuffled(math.prod(map(len, parts)), seeded):
        chosen: list[Any] = []
        for part in parts:
            card, digit = divmod(card, len(part))
            chosen.append(part[digit])
        things, name, *operands = chosen
        numbers = template.numbers(operands)
        if is_held_out(numbers[letter] for letter in template.asked) != (split == "held_out"):
            continue
        question, answer = template.render(operands, name, things)
        problem_id = f"word_problems/{level}/{template.name}/{name}-{things}-{'-'.join(map(str, operands))}"
        yield {"question": question, "answer": answer, "level": level, "id": problem_id}


def _shuffled(size: int, key: str) -> Iterator[int]:
    """0 … size − 1 in random order (Fisher–Yates); work and memory grow with what is taken, not with size."""
    rng = random.Random(key)
    moved: dict[int, int] = {}
    for position in range(size):
        chosen = rng.randrange(position, size)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(position, position)

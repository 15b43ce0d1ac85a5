"""Letters to put in alphabetical order: the task of the demo, whose answers can be checked without knowing them.

From few worked answers a policy learns what is asked for and part of the order. Whether an answer is right follows from
the question alone, so a reward can teach the rest (examples/01_demo.py).
"""

from __future__ import annotations

import hashlib
import random

LETTERS = "abcdefghijklmnopqrst"
LENGTHS = range(4, 9)
COUNT, MOST = 20_000, 100_000


def letter_sorting(split: str, seed: int = 0, *, count: int = COUNT) -> list[dict[str, str]]:
    """Problems with the keys `question`, `answer` and `id`, each with other letters.

    A hash of the letters, in whatever order, puts about one set in eight into the split `held_out`, whatever the seed.
    So no set of letters is in both splits. Raises ValueError for another split, and for more than 100,000 problems.

    >>> letter_sorting("train", count=1)[0]
    {'question': 'Sort these letters: t k c p', 'answer': '#### c k p t', 'id': 'letter_sorting/tkcp'}
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"letter_sorting has no split {split!r}; use train or held_out")
    if not 1 <= count <= MOST:
        raise ValueError(f"letter_sorting cannot make {count} problems; ask for 1 to {MOST:,}")
    rng = random.Random(f"letter_sorting/{split}/{seed}")
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < count:
        letters = rng.sample(LETTERS, rng.choice(LENGTHS))
        in_order = "".join(sorted(letters))
        if in_order in problems or _is_held_out(in_order) != (split == "held_out"):
            continue
        problems[in_order] = {
            "question": f"Sort these letters: {' '.join(letters)}",
            "answer": f"#### {' '.join(in_order)}",
            "id": f"letter_sorting/{''.join(letters)}",
        }
    return list(problems.values())


def _is_held_out(in_order: str) -> bool:
    return hashlib.sha256(in_order.encode()).digest()[0] % 8 == 0

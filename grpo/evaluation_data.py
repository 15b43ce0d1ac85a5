"""Data for evaluation must not be trained on: what a split, a file or a row gives away."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

EVALUATION_SPLITS = ("test", "heldout", "all")

_NUMBERED = r"(?:[-_.]?\d+(?:[-_.]of[-_.]\d+)?)?"  # of a shard, as in test-00000-of-00001
_EVALUATION_FILE = re.compile(rf"all|(?:.*[-_.])?(?:test|heldout){_NUMBERED}|(?:test|heldout)[-_.].*")
# One line for each of the 1,319 test questions of GSM8K: the first 12 hex digits of the SHA-256 of its `_letters`.
_GSM8K_TEST_QUESTIONS = Path(__file__).with_name("gsm8k_test_questions.txt")


def refuse_evaluation_data(source: str, split: str, path: Path | None) -> None:
    """Raises ValueError where the split, or the file that `path` really is, is named after a test set.

    A file called train.jsonl that is a link to test.jsonl is test data; so is gsm8k_test-00000-of-00001.parquet.
    """
    # a split of the hub can be a sum of slices: "train+test[:50%]"
    names = [part.split("[")[0].strip() for part in split.split("+")]
    forbidden = [name for name in names if name.casefold() in EVALUATION_SPLITS]
    stems = dict.fromkeys([path.stem, path.resolve().stem]) if path else ()
    forbidden += [stem for stem in stems if _EVALUATION_FILE.fullmatch(stem.casefold())]
    if forbidden:
        raise ValueError(
            f"{forbidden[0]!r} of {source} is for evaluation and must not be trained on; "
            "train on another split, or load it with purpose='eval'"
        )


def is_gsm8k_test_question(texts: Iterable[Any]) -> bool:
    """Whether one of the texts is a question of GSM8K's test set, whatever its file is called.

    Letter case, punctuation and white space do not count. A question inside a longer text is not found.
    """
    known = _gsm8k_test_questions()
    return any(isinstance(text, str) and fingerprint(text) in known for text in texts)


def fingerprint(text: str) -> str:
    """48 bits of a question's letters and digits: in a million other texts, one is mistaken with probability 5e-6.

    >>> fingerprint("How many  eggs?") == fingerprint("how many eggs ?")
    True
    """
    return hashlib.sha256(_letters(text).encode(errors="replace")).hexdigest()[:12]


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


@lru_cache(maxsize=1)
def _gsm8k_test_questions() -> frozenset[str]:
    return frozenset(_GSM8K_TEST_QUESTIONS.read_text().split())

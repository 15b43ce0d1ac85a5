"""Held out means unseen (contract 16): what must not be trained on, and what must not be evaluated after it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

EVALUATION_SPLITS = ("test", "held_out", "heldout", "all")

_NUMBERED = r"(?:[-_.]?\d+(?:[-_.]of[-_.]\d+)?)?"  # of a shard, as in test-00000-of-00001
_EVALUATION_FILE = re.compile(rf"all|(?:.*[-_.])?(?:test|held_?out){_NUMBERED}|(?:test|held_?out)[-_.].*")
_NOT_CONTENT = re.compile(r"""["'`“”‘’]|[.,:;?]+(?!\w)|\s+""")
NAMED = 5


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
            "train on another split (eval.split is the one to evaluate on)"
        )


def is_gsm8k_test_question(texts: Iterable[Any]) -> bool:
    """Tells whether one of the texts is a question of GSM8K's test set, whatever its file is called.

    Letter case, punctuation and white space do not count. A question inside a longer text is not found.
    """
    known = _gsm8k_test_questions()
    return any(isinstance(text, str) and fingerprint(text) in known for text in texts)


def fingerprint(text: str) -> str:
    """48 bits of a question's letters and digits: in a million other texts, one is mistaken with probability 5e-6.

    >>> fingerprint("How many  eggs?") == fingerprint("how many eggs ?")
    True
    """
    return _digest(re.sub(r"\W+", "", text))


def problem_fingerprint(content: str) -> str:
    """48 bits of a problem's content, to compare users' own data with each other.

    Letter case, white space, quotation marks and the punctuation at the end of a word do not count. Operators do,
    because 2 + 3 and 2 - 3 are two problems.

    >>> problem_fingerprint("What is 2 + 3?") == problem_fingerprint("what is  2 + 3 ?")
    True
    >>> problem_fingerprint("2 + 3") == problem_fingerprint("2 - 3")
    False
    """
    return _digest(_NOT_CONTENT.sub("", content))


def in_held_out(fingerprint: str, share: float) -> bool:
    """Tells whether the problem is one of the share that is held out. Other problems, as in new rows, change nothing.

    >>> [in_held_out(f"{i:012x}", 0.25) for i in range(6)]
    [True, False, False, False, False, True]
    """
    # every later version draws by the words of the first, so that no problem changes sides
    drawn = hashlib.sha256(f"holdout/0/{fingerprint}".encode()).digest()[:6]
    return int.from_bytes(drawn) < share * 2**48


def refuse_overlap(evaluated: Mapping[str, str], known: Mapping[str, str], what: str, way_out: str) -> None:
    """Raises ValueError where evaluated problems are among the `known` ones. Both map fingerprints to problems' names.

    `what` says what was done with the known ones, `way_out` what to do now.
    """
    if common := [fingerprint for fingerprint in evaluated if fingerprint in known]:
        named = ", ".join(_pair(evaluated[fingerprint], known[fingerprint]) for fingerprint in common[:NAMED])
        more = ", ..." if len(common) > NAMED else ""
        raise ValueError(
            f"{len(common)} of {len(evaluated)} problems that are to be evaluated {what}: {named}{more}. {way_out}"
        )


def _pair(evaluated: str, known: str) -> str:
    return f"{evaluated} (it is {known})" if known and known != evaluated else evaluated


def _digest(text: str) -> str:
    return hashlib.sha256(text.casefold().encode(errors="replace")).hexdigest()[:12]


@cache
def _gsm8k_test_questions() -> frozenset[str]:
    """The `fingerprint` of each of the 1,319 test questions of GSM8K."""
    return frozenset(Path(__file__).with_name("gsm8k_test_questions.txt").read_text().split())

"""The graders of answers against pairs that other projects' tests hold: answer, reference, and whether they are equal.

`tests/cases/public_answer_pairs.jsonl` names the source, the licence and the file of each. A pair is one that the
source itself checks with its default options. Where a source gives a bare answer, that is the whole completion.
"""

import json
import re
from pathlib import Path

import pytest

from rewards.built_in.gsm8k import gsm8k, gsm8k_boxed

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "cases/public_answer_pairs.jsonl").read_text("utf-8").splitlines()
]
EQUAL_REFUSED = 0.05  # at most

# Labels that are not of the kind that the grader answers for, by answer and reference, and why.
NO_FORMAT = "the label is about a format: the value is the reference"
NOT_EQUAL = "the two are not equal: the source's test keeps what its parser gives"
EXCEPTIONS = {
    ("Answer $ \n 9 \n $", "$9$"): NO_FORMAT,
    ("Answer \\( \n 9 \n \\)", "$9$"): NO_FORMAT,
    ("The answer is 42", "42"): NO_FORMAT,
    (r"Answer: \boxed{0.5}", r"\frac{1}{2}"): NO_FORMAT,
    (r"<|im_start|>Answer: \boxed{42}im_end|>", "42"): NO_FORMAT,
    (r"Answer: \boxed{42}|eot_id|>", "42"): NO_FORMAT,
    (r"$-2 \\le x \\le 7$", r"$x \in [-2,7]$"): NO_FORMAT,
    (r"$1 + \frac{1}{\mathrm{e}}$", r"$1 - \frac{1}{\mathrm{e}}$"): NOT_EQUAL,
}
PERCENT = ("10%", "0.1")  # GSM8K asks for percents as plain numbers

# What gsm8k answers for: a reference that is one plain number, and an answer that is one, bare, marked or boxed.
_DIGITS = r"(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d+|(?=\.\d))(?:\.\d+)?"
PLAIN = re.compile(rf"(?:\\?\$)?[-+]?(?:\\?\$)?{_DIGITS}(?: ?\\?%)?(?: [a-z]+)*")
BOXED = re.compile(rf"\\boxed\{{{PLAIN.pattern}\}}(?!.*boxed)", re.DOTALL)


def check(pairs, score):
    refused, taken = [], []
    for pair in pairs:
        equal = score(pair) == 1.0
        if equal != pair["equal"]:
            (taken if equal else refused).append((pair["answer"][-80:], pair["reference"][-80:]))
    assert taken == []
    assert len(refused) <= EQUAL_REFUSED * sum(pair["equal"] for pair in pairs), refused


def test_the_pairs_say_where_they_are_from():
    assert len(PAIRS) >= 400
    assert {pair["licence"] for pair in PAIRS} == {"MIT", "Apache-2.0"}
    assert all(pair["source"] and pair["file"] and pair["test"] for pair in PAIRS)
    known = {(pair["answer"], pair["reference"]) for pair in PAIRS}
    assert known >= EXCEPTIONS.keys()


@pytest.mark.slow
def test_math_equivalence_takes_equal_answers_in_the_forms_of_others_and_no_unequal_one():
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    def score(pair):
        return math_equivalence(None, [pair["answer"]], answer=[pair["reference"]])[0]

    check([pair for pair in PAIRS if (pair["answer"], pair["reference"]) not in EXCEPTIONS], score)


def test_gsm8k_takes_equal_numbers_in_the_forms_of_others_and_no_unequal_one():
    numbers = [pair for pair in PAIRS if PLAIN.fullmatch(pair["reference"])]
    left_out = {PERCENT, *EXCEPTIONS}
    numbers = [pair for pair in numbers if (pair["answer"], pair["reference"]) not in left_out]
    bare = [pair for pair in numbers if PLAIN.fullmatch(pair["answer"])]
    boxed = [pair for pair in numbers if BOXED.search(pair["answer"])]
    marked = [pair for pair in numbers if "####" in pair["answer"] and pair not in boxed]
    assert len(bare) + len(boxed) + len(marked) >= 30
    in_box = [pair | {"answer": rf"\boxed{{{pair['answer']}}}"} for pair in bare]
    behind_mark = [pair | {"answer": f"#### {pair['answer']}"} for pair in bare]
    for grader, pairs in ((gsm8k, behind_mark + marked), (gsm8k_boxed, in_box + boxed)):

        def score(pair, grader=grader):
            return grader(None, [pair["answer"]], answer=[pair["reference"]])[0]

        check(pairs, score)

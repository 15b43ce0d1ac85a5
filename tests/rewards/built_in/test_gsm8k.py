"""GSM8K answers: the golden table, the real gold solutions, exactness, and hostile text."""

import json
import re
import time
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.built_in.format import gsm8k_format, tag_format
from rewards.built_in.gsm8k import extract_answer, gold_answer, gsm8k, gsm8k_boxed, gsm8k_flexible, gsm8k_lm_eval

GOLDEN = [  # text, strict, flexible, boxed
    ("6 * 7 = 42\n#### 42", 42, 42, None),
    ("#### 42 apples, as I said", 42, 42, None),
    ("#### 42. That took 3 steps", 42, 3, None),
    ("#### 42, or so", 42, 42, None),
    ("#### 1,234", 1234, 1234, None),
    ("#### 1,234,567.50", Decimal("1234567.5"), Decimal("1234567.5"), None),
    ("#### $42", 42, 42, None),
    ("#### -$42", -42, -42, None),
    ("#### $-42", -42, -42, None),
    (r"#### \$42", 42, 42, None),
    ("#### 42.0", 42, 42, None),
    ("#### 42.", 42, 42, None),
    ("#### .5", Decimal("0.5"), Decimal("0.5"), None),
    ("#### 007", 7, 7, None),
    ("#### -5", -5, -5, None),
    ("#### +5", 5, 5, None),
    ("#### \u22125", -5, -5, None),
    ("#### \u20135", -5, -5, None),
    ("#### 5%", 5, 5, None),
    ("####42", 42, 42, None),
    ("#### \uff14\uff12", 42, 42, None),
    ("#### 4\uff12", 42, 42, None),
    ("####\u00a042\u00a0apples", 42, 42, None),
    ("#### 1 234", None, 234, None),  # what goes on is another number, and never the beginning of it
    ("#### 1\u00a0234", None, 234, None),
    ("#### 1\u202f234", None, 234, None),
    ("#### 1'234", None, 234, None),
    ("#### 1_000", None, 0, None),
    ("#### 4\u0662", None, 4, None),
    ("#### 42\u00bd", None, 42, None),
    ("#### 42\u00b2", None, 42, None),
    ("#### 4 x 10", None, 10, None),
    ("#### 42 (3 dozen and 6)", 42, 6, None),
    ("#### 42's the answer", 42, 42, None),
    ("#### **42**", 42, 42, None),
    ("#### \uff11\uff0c\uff12\uff13\uff14", 1234, 1234, None),
    ("#### \uff12\uff0e\uff15", Decimal("2.5"), Decimal("2.5"), None),
    ("#### \uff04\uff0b5\uff05", 5, 5, None),
    ("#### 5**2", None, 2, None),
    ("#### 5 ** 2", None, 2, None),
    ("#### 5!", None, 5, None),
    ("#### 5 million", None, 5, None),
    ("#### 5k", None, 5, None),
    (r"#### 5\text{ million}", None, 5, None),
    (r"\boxed{5~\text{thousand}}", None, 5, None),
    (r"\boxed{5\text{ dollars}}", None, 5, 5),
    ("#### 42 or 43", None, 43, None),
    ("#### $42 and $43", None, 43, None),
    (r"\boxed{42\text{ to }43}", None, 43, None),
    ("#### 42 and so on", 42, 42, None),
    ("#### 42 oranges", 42, 42, None),
    ("#### 5 km", 5, 5, None),
    ("#### **42**!", 42, 42, None),
    ("#### 42\n#### x = 43", None, 43, None),  # a second guess, which cannot be read
    ("#### 42\n#### 1,23", None, 42, None),
    ("#### 42\n#### forty-three", 42, 42, None),
    ("#### 7\nWait.\n#### 42", 42, 42, None),
    ("#### 42\n#### 42", 42, 42, None),
    ("#### 42\n\n#### Notes", 42, 42, None),
    ("so 8 #### 1,23", None, 8, None),
    ("so 8 #### 1.2.3", None, 8, None),
    ("#### 0,123", None, None, None),
    ("#### 84/2", None, 2, None),
    ("#### 6 * 7 = 42", None, 42, None),
    ("#### 42 - 2", None, 2, None),
    ("#### 3 1/2", None, 2, None),
    ("#### 4e1", None, 1, None),
    ("#### 10:30", None, 30, None),
    ("#### The answer is 42", None, 42, None),
    ("####\n42", None, 42, None),
    ("The answer is 42.", None, 42, None),
    ("10-5", None, 5, None),
    ("from 3\u20135", None, 5, None),
    ("x = -5", None, -5, None),
    (r"so \boxed{42}", None, 42, 42),
    (r"\boxed{1} no, \boxed{\$1{,}234}", None, 1234, 1234),
    (r"#### 1{,}234", 1234, 1234, None),  # as LaTeX writes thousands: never 1 or 234
    (r"#### $1{,}234{,}567$", 1234567, 1234567, None),
    (r"#### 1\,234", 1234, 1234, None),
    (r"#### 1,\!234", 1234, 1234, None),
    (r"#### 1\,23", None, None, None),
    ("#### 10^-3", None, -3, None),  # as 10^3, no answer yet
    ("#### 10^{-3}", None, -3, None),
    ("#### \u20115", -5, -5, None),  # the hyphen that does not break
    (r"\boxed{42\text{ apples}}", None, 42, 42),
    (r"\boxed{-5\%}", None, -5, -5),
    (r"\boxed{42^\circ}", None, 42, 42),
    (r"\boxed{3\sqrt{2}}", None, 2, None),
    (r"\boxed{3\frac12}", None, 12, None),
    (r"\boxed{3 \times 4}", None, 4, None),
    (r"\boxed{2^{5}}", None, 5, None),
    (r"\boxed{\frac{1}{2}}", None, 2, None),
    (r"\boxed{42", None, 42, None),
    ("I do not know", None, None, None),
    ("####", None, None, None),
    ("", None, None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "boxed"), GOLDEN)
def test_golden_table(text, strict, flexible, boxed):
    answers = [extract_answer(text, mode) for mode in ("strict", "flexible", "boxed")]
    assert answers == [strict, flexible, boxed]


@pytest.mark.parametrize(
    "gold", ["#### forty-two", "no number", "#### 1,23", "", "3 or 4", "nan", None, True, float("inf"), ["42"]]
)
def test_a_malformed_gold_raises_and_is_no_zero(gold):
    with pytest.raises(ValueError, match=r"gold answer .* has no number"):
        gsm8k(None, ["#### 42"], answer=[gold])


@pytest.mark.parametrize(
    "gold",
    [
        "... #### 1,234",
        "1,234",
        "\uff11\uff0c\uff12\uff13\uff14",
        r"1,234\%",
        "$1234",
        1234,
        1234.0,
        "1234.00",
        " 1234 ",
        "\uff11234",
    ],
)
def test_forms_of_a_gold_number(gold):
    assert gold_answer(gold) == 1234


def test_rewards_of_the_three_modes():
    texts = ["#### 42", "it is 42", r"\boxed{42}", "#### 41"]
    assert gsm8k(None, texts, answer=["42"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert gsm8k_flexible(None, texts, answer=["42"] * 4) == [1.0, 1.0, 1.0, 0.0]
    assert gsm8k_boxed(None, texts, answer=["42"] * 4) == [0.0, 0.0, 1.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert gsm8k(None, chat, answer=["42"] * 4) == [1.0, 0.0, 0.0, 0.0]


LM_EVAL = [  # text, gold, lm-evaluation-harness' strict match, gsm8k: worked out by hand from its gsm8k.yaml
    ("6 * 7 = 42\n#### 42", "#### 42", 1, 1),
    ("#### 1,234", "#### 1,234", 1, 1),
    ("#### 1234", "so <<1+2=3>>3\n#### 1,234", 1, 1),
    ("#### 1,2,34", "#### 1,234", 1, 0),
    ("#### 42.", "#### 42", 1, 1),
    ("#### 42..", "#### 42", 0, 1),
    ("#### 42.0", "#### 42", 0, 1),
    ("#### 42.0", "#### 42.0", 1, 1),
    ("#### 42.00", "#### 42.0", 0, 1),
    ("#### 042", "#### 42", 0, 1),
    ("#### -5", "#### -5", 1, 1),
    ("#### \u22125", "#### -5", 0, 1),
    ("#### +42", "#### 42", 0, 1),
    ("#### $42", "#### 42", 0, 1),
    ("#### -$42", "#### -42", 0, 1),
    ("#### 42", "#### $42", 1, 1),
    ("####42", "#### 42", 0, 1),
    ("####  42", "#### 42", 0, 1),
    ("####\n42", "#### 42", 0, 0),
    ("#### **42**", "#### 42", 0, 1),
    ("#### \uff14\uff12", "#### 42", 0, 1),
    ("##### 42", "#### 42", 1, 1),
    ("#### 7 no\n#### 42", "#### 42", 0, 1),
    ("#### 42\n#### 7", "#### 42", 1, 0),
    ("#### none\n#### $7\n#### 42", "#### 42", 1, 1),
    ("#### 42 apples", "#### 42", 1, 1),
    ("#### 42%", "#### 42", 1, 1),
    ("#### 42/2", "#### 42", 1, 0),
    ("#### 42 000", "#### 42", 1, 0),
    ("#### 1.2.3", "#### 12.3", 0, 0),
    ("#### , then #### 42", "#### 42", 0, 1),
    ("The answer is 42.", "#### 42", 0, 0),
    ("", "#### 42", 0, 0),
    ("#### 42", "42", 1, 1),
]


@pytest.mark.parametrize(("text", "gold", "theirs", "ours"), LM_EVAL)
def test_the_strict_match_of_lm_evaluation_harness_and_how_ours_differs(text, gold, theirs, ours):
    chat = [[{"role": "assistant", "content": text}]]
    assert gsm8k_lm_eval(None, [text], answer=[gold]) == gsm8k_lm_eval(None, chat, answer=[gold]) == [theirs]
    assert gsm8k(None, [text], answer=[gold]) == [ours]


def test_lm_eval_grades_gold_solutions_as_right_and_refuses_a_malformed_gold(gsm8k_folder):
    answers = [json.loads(line)["answer"] for line in (gsm8k_folder / "test.jsonl").read_text().splitlines()]
    assert gsm8k_lm_eval(None, answers, answer=answers) == [1.0] * 1319
    with pytest.raises(ValueError, match=r"gold answer .* has no number"):
        gsm8k_lm_eval(None, ["#### 42"], answer=["#### forty-two"])


def test_an_unknown_mode_names_the_choices():
    with pytest.raises(ValueError, match=r"mode='stric' .* strict, flexible, boxed"):
        gsm8k(None, ["#### 1"], answer=["1"], mode="stric")


def test_numbers_are_compared_exactly():
    big = "123456789012345678901234567890123456789"
    assert gsm8k(None, [f"#### -{big}", f"#### -{big[:-1]}8"], answer=[f"-{big}"] * 2) == [1.0, 0.0]
    assert gsm8k(None, ["#### 0.1", "#### 0.1000000000000000055"], answer=["0.1"] * 2) == [1.0, 0.0]


@pytest.mark.slow
def test_every_gold_solution_scores_one_and_every_altered_one_zero(gsm8k_folder):
    answers = []
    for split in ("train", "test"):
        with open(gsm8k_folder / f"{split}.jsonl", encoding="utf-8") as file:
            answers += [json.loads(line)["answer"] for line in file]
    assert len(answers) == 8792
    assert gsm8k(None, answers, answer=answers) == [1.0] * 8792
    assert gsm8k_flexible(None, answers, answer=answers) == [1.0] * 8792
    assert gsm8k_format(None, answers) == [1.0] * 8792
    altered = [re.sub(r"#### .*", f"#### {gold_answer(answer) + 1}", answer) for answer in answers]
    assert gsm8k(None, altered, answer=answers) == [0.0] * 8792
    assert gsm8k_flexible(None, altered, answer=answers) == [0.0] * 8792


BAIT = [
    *("####", "#### ", "\\boxed{", "}", "1", "1,", ",234", "1.", ".", "-", "$", "\\$", " ", "\t", "*", "\n", "e"),
    *("\u2212", "<think>", "</answer>", "\x00", "\ud800", "\u0664", "9" * 50),
    *("\u00a0", "\uff11", "\u00bd", "#### 1 \\", "#### 1 x"),
]
parts = st.one_of(st.sampled_from(BAIT), st.text(max_size=5), st.binary(max_size=5).map(lambda b: b.decode("latin-1")))
repeated = st.builds(lambda unit, count: "".join(unit) * count, st.lists(parts, max_size=4), st.integers(1, 100_000))
hostile = st.lists(repeated.map(lambda text: text[:60_000]), max_size=4).map(lambda texts: "".join(texts)[:100_000])


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(hostile)
def test_any_text_is_graded_in_bounded_time(text):
    start = time.process_time()
    for reward in (gsm8k, gsm8k_flexible, gsm8k_boxed):
        assert reward(None, [text], answer=["-987654321.5"])[0] in (0.0, 1.0)
    assert gsm8k_format(None, [text])[0] in (0.0, 1.0)
    assert tag_format(None, [text])[0] in (0.0, 1.0)
    assert time.process_time() - start < 2.0  # quadratic time would take minutes


@pytest.mark.parametrize("unit", [*BAIT, "1,234", "1,2", "#### 1", "\\boxed{1", "#### 1 #### a", "-$-", "$1", "1 "])
def test_a_hundred_thousand_characters_of_bait(unit):
    start = time.process_time()
    text = (unit * 100_000)[:100_000]
    for reward in (gsm8k, gsm8k_flexible, gsm8k_boxed):
        assert reward(None, [text, "#### " + text], answer=["-987654321.5"] * 2) == [0.0, 0.0]
    assert time.process_time() - start < 2.0

"""What a reward does besides giving marks: changes, prints and leaks are found, in one completion or in a batch."""

import pytest

from rewards import RewardError
from rewards.commands.conduct import check_conduct
from rewards.commands.options import RewardTestConfig
from rewards.config.options import load

FILE = """
import os, re
KEPT = []

def gold(completions, answer, **_):
    return [float(text.strip() == right.strip()) for text, right in zip(completions, answer)]

def turns(completions, answer, **_):
    marks = gold(completions, answer)
    answer.reverse()
    return marks

def writes(prompts, completions, answer, **_):
    marks = gold([message[0]["content"] for message in completions], answer)
    prompts[0][0]["content"] = "?"
    return marks

def prints(completions, answer, **_):
    for text in completions:
        if text == "":
            os.write(2, b"nothing to read\\n")
    return gold(completions, answer)

def leaks(completions, answer, **_):
    KEPT.append([text + "." for text in completions])
    return gold(completions, answer)

def caches(completions, answer, cache={}, **_):
    for text in completions:
        cache[text] = re.compile(re.escape(text[:100]))
    return gold(completions, answer)

def nan(completions, **_):
    return [float("nan") if text == "" else 1.0 for text in completions]

def raises(completions, **_):
    return [1 / len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FILE)
    return path


def problems(function, *allowed, **options):
    config = load(RewardTestConfig, None, {"data.limit": 2, **options})
    check = check_conduct(str(function), config, ("hash_seed", *allowed))
    return [finding.evidence for finding in check.faults]


@pytest.mark.slow
def test_a_reward_that_only_gives_marks_has_no_problem(file):
    assert problems(f"{file}:gold") == []
    assert problems(f"{file}:caches") == []  # which are full at some time


@pytest.mark.slow
def test_an_argument_that_is_changed_is_named(file):
    [problem] = problems(f"{file}:turns")
    assert problem.startswith("it changes its arguments answer; in a batch, which begins with prompt 'Ben has 3 shells")
    [problem] = problems(f"chat:{file}:writes")
    assert problem.startswith("it changes its arguments prompts; prompt ")
    assert problems(f"{file}:turns", "changes") == []


def test_what_is_printed_is_shown_with_the_completion(file):
    [problem] = problems(f"{file}:prints")
    assert problem.startswith(r"it prints 'nothing to read\n'; prompt 'Ben has 3 shells")
    assert problem.endswith("completion ''")


def test_memory_that_every_call_keeps_is_a_leak(file):
    [problem] = problems(f"{file}:leaks")
    assert problem.startswith("it leaks memory, ")
    assert int(problem.split()[3].replace(",", "")) > 1000


def test_a_failure_has_prompt_and_completion(file):
    for function, cause in {"nan": "nan: returned nan", "raises": "raised: ZeroDivisionError"}.items():
        with pytest.raises(RewardError, match=cause) as caught:
            problems(f"{file}:{function}", shaping=True)
        assert "The prompt: 'Ben has 3 shells" in str(caught.value)
        assert "The completion (nothing): ''" in str(caught.value)

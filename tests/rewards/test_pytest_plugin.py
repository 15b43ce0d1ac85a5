"""The fixture quartet_reward in a pytest of its own: what is wrong with a reward fails the test that tries it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FILE = """
import itertools
import time

TURNS = itertools.count()
ROWS = [{"question": "What is 2 + 3?", "answer": "#### 5"}, {"question": "What is 4 + 4?", "answer": "#### 8"}]


def gold(completions, answer, **columns):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def hanging(completions, **columns):
    while True:
        time.sleep(1)


def hacked(completions, **columns):
    return [float("####" in text) for text in completions]


def flaky(completions, answer, **columns):
    return [mark * (1 if next(TURNS) % 7 else 0.5) for mark in gold(completions, answer)]


def seeded(completions, **columns):
    return [hash(text) % 1000 / 1000 for text in completions]


def test_gold(quartet_reward):
    assert quartet_reward(gold, ROWS).rows == 2
    assert quartet_reward(f"{__file__}:gold").rows == 3


def test_hanging(quartet_reward):
    quartet_reward(hanging, ROWS, reward={"timeout_s": 0.2})


def test_hacked(quartet_reward):
    quartet_reward(hacked, ROWS)


def test_flaky(quartet_reward):
    quartet_reward(flaky, ROWS, allow=["hash_seed"])


def test_seeded(quartet_reward):
    quartet_reward(seeded, ROWS, shaping=True)


def test_nameless(quartet_reward):
    quartet_reward(lambda completions, **columns: [0.0] * len(completions), ROWS)


def test_misspelt(quartet_reward):
    quartet_reward(gold, ROWS, allow=["leak"])
"""
OF_TRL = """
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

cosine = get_cosine_scaled_reward(max_len=1000)
repetition = get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)
overlong = get_soft_overlong_punishment(max_completion_len=1000, soft_punish_cache=200)
GOLD = "<think>one more</think>It is \\\\boxed{%d}"
ROWS = [{"question": f"What is {n} + 1?", "answer": GOLD % (n + 1), "solution": f"${n + 1}$"} for n in range(2, 6)]


def test_accuracy(quartet_reward):
    assert quartet_reward(accuracy_reward, ROWS, form="chat").no_accuracy is None
    quartet_reward(reasoning_accuracy_reward, ROWS, form="chat")


def test_shaping(quartet_reward):
    for reward in (think_format_reward, cosine, repetition, overlong):
        quartet_reward(reward, ROWS, form="chat", shaping=True)


def test_accuracy_as_if_any_thought_were_an_answer(quartet_reward):
    quartet_reward(think_format_reward, ROWS, form="chat")
"""

OF_VERIFIERS = """
import verifiers.v1 as vf

ROWS = [{"question": "6 * 7?", "answer": "42"}, {"question": "1 + 1?", "answer": "2"}]


class SumData(vf.TaskData):
    answer: str


class Right(vf.Task[SumData]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply.strip() == task.answer)


class Kind(vf.Task[SumData]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return 1.0


def test_right(quartet_reward):
    quartet_reward(Right, ROWS, form="verifiers")


def test_kind(quartet_reward):
    quartet_reward(Kind, ROWS, form="verifiers")
"""


def run(folder: Path, text: str, *words: str) -> tuple[dict[str, str], str]:
    """What is said of each test by its name, empty for one that has passed, and what pytest has printed."""
    (folder / "test_it.py").write_text(text)
    plugin = ["-p", "no:quartet", "-p", "rewards.pytest_plugin"]  # it may not be installed here, or an older one
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "--junitxml", "found.xml", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    cases = ElementTree.parse(folder / "found.xml").iter("testcase")
    messages = {case.attrib["name"]: "".join(f.text or "" for f in case.iter("failure")) for case in cases}
    return messages, done.stdout


@pytest.mark.slow
def test_what_is_wrong_with_a_reward_fails_its_test_with_prompt_and_sample(tmp_path):
    messages, _ = run(tmp_path, FILE, "--quartet-limit", "3", "--quartet-data", "word_problems")
    assert messages.pop("test_gold") == ""
    assert "timeout: no result after 0.2 s, stuck at test_it.py:" in messages["test_hanging"]
    assert "nothing: 2 of 2" not in messages["test_hacked"]
    assert "gold, last digit raised: 2 of 2 get full marks" in messages["test_hacked"]
    assert "completion '#### 6'" in messages["test_hacked"]
    assert "score differently scored again: first on row" in messages["test_flaky"]
    assert "PYTHONHASHSEED" not in messages["test_flaky"]
    assert "score differently with PYTHONHASHSEED=1: first on row 1" in messages["test_seeded"]
    for name in ("hanging", "hacked", "flaky", "seeded"):
        message = messages.pop(f"test_{name}")
        assert f"test_it.py:{name}" in message
        assert "What is 2 + 3?" in message, name
        assert "ompletion" in message
    assert "has no name at the top of" in messages.pop("test_nameless")
    assert "the habits that can be allowed are hash_seed, changes, prints, leaks" in messages.pop("test_misspelt")
    assert messages == {}


@pytest.mark.long
def test_rewards_of_trl_run_through_it(tmp_path):
    messages, printed = run(tmp_path, OF_TRL)
    wrong = messages.pop("test_accuracy_as_if_any_thought_were_an_answer")
    assert "gold, last digit raised: 4 of 4 get full marks" in wrong
    assert set(messages.values()) == {""}, printed


@pytest.mark.peer
def test_tasks_of_verifiers_run_through_it(tmp_path):
    pytest.importorskip("verifiers.v1.trace", reason="verifiers 0.4 is not installed")
    messages, printed = run(tmp_path, OF_VERIFIERS, "--quartet-timeout", "60")
    assert messages["test_right"] == "", printed
    assert "nothing: 2 of 2 get full marks" in messages["test_kind"]

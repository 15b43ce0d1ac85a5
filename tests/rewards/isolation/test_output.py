"""What a reward prints is shown without control characters, and not without end."""

import subprocess
import sys

import pytest

from rewards import RewardSpec, Scorer
from rewards.isolation.output import IN_A_CALL, IN_ALL, Output

PRINTS = """
import os, sys
def grade(completions, **_):
    for completion in completions:
        what, times = completion.split()
        for _ in range(int(times)):
            print(what)
        os.write(2, b"\\x1b]0;owned\\x07 \\xc3\\xa9 \\xff\\n")
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "prints.py"
    file.write_text(PRINTS)
    return RewardSpec(f"{file}:grade")


def test_control_characters_are_visible_and_letters_stay(reward, capfd):
    with Scorer([reward]) as scorer:
        scorer.score(["p"], [["\x1b[2J 1"]], [{}], prompt_ids=["a"])
    assert capfd.readouterr().err == "\\x1b[2J\n\\x1b]0;owned\\x07 é \\xff\n"


def test_each_call_shows_its_beginning_and_all_calls_together_have_a_limit(tmp_path, capfd, monkeypatch):
    """Each call is read to its end here. In a run what is read late counts as printed by the next call."""
    monkeypatch.setattr("rewards.isolation.output.IN_ALL", 2 * IN_A_CALL + 100)
    output = Output()
    for call in range(5):
        (tmp_path / "printed").write_bytes(f"call-{call} ".encode() + b"x" * 40_000)
        output.begin_call()
        output._read((tmp_path / "printed").open("rb"))
    said = capfd.readouterr().err
    assert 2 * IN_A_CALL < len(said) < 2 * IN_A_CALL + 1000
    assert [f"call-{call}" in said for call in range(5)] == [True, True, True, False, False]
    assert said.count("more than 16 KiB in one call: the rest is not shown") == 2
    assert said.count("KiB in all: the rest is not shown") == 1


def test_a_process_that_a_reward_leaves_in_another_session_does_not_hold_the_end(tmp_path):
    output = Output()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], stdout=subprocess.PIPE)
    try:
        output.follow(process.stdout)
        output.finish()  # after a second
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert IN_ALL > IN_A_CALL

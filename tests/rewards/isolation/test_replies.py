"""A reward that writes into its worker's socket, or closes it, is a failure of its completion and ends nothing."""

import json

import pytest

from rewards import RewardError, RewardSpec, Scorer
from rewards.isolation.replies import BadReply, read_reply

HOSTILE = r"""
import os, stat

def write(data):
    for name in os.listdir("/dev/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), data)
        except OSError:
            pass

def grade(completions, **_):
    for completion in completions:
        if completion == "interrupt":
            raise KeyboardInterrupt
        if completion == "close":
            os.closerange(3, 100)
        elif completion != "fine":
            write(completion.encode("latin-1"))
    return [1.0] * len(completions)
"""
WRITTEN = [
    "nonsense\n",
    '{"rewards": [',
    '{"number": 2, "rewards": [9.0], "extras": {}, "metrics": {}}\n{"number": 2, "rewards": [9.0]}\n',
    "[" * 100_000 + "\n",
    "x" * (2 << 20),
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "hostile.py"
    file.write_text(HOSTILE)
    with Scorer([RewardSpec(f"{file}:grade")], on_error="drop_sample", timeout_s=20.0) as scorer:
        yield scorer


@pytest.mark.parametrize("attack", [*WRITTEN, "close"], ids=range(len(WRITTEN) + 1))
def test_only_the_completion_that_sets_it_off_has_no_reward(scorer, attack, monkeypatch):
    monkeypatch.setattr("rewards.isolation.pool.MOST_BYTES", 1 << 20)
    [score, other] = scorer.score(["p", "q"], [["fine", attack], ["fine"]], [{}, {}], prompt_ids=["a", "b"])
    assert (score.rewards, other.rewards) == ([1.0, None], [1.0])
    assert [(error.sample_index, error.kind) for error in score.errors] == [(1, "died")]
    assert ("socket" in score.errors[0].message) == (attack != "close")


def test_a_keyboard_interrupt_that_a_reward_raises_is_its_failure_and_ends_no_worker(scorer):
    scorer.take_lost()
    [score] = scorer.score(["p"], [["fine", "interrupt"]], [{}], prompt_ids=["a"])
    assert (score.rewards, score.errors[0].kind) == ([1.0, None], "raised")
    assert "KeyboardInterrupt (hostile.py:" in score.errors[0].message
    assert scorer.take_lost()[0] == 0


def test_what_a_file_writes_while_it_is_loaded_is_an_error(tmp_path):
    file = tmp_path / "hostile.py"
    forged = b'{"number": 1, "signatures": [{"x": 1}]}\n'
    file.write_text(f"{HOSTILE}\nwrite({forged!r})\nimport time\ntime.sleep(60)\n")
    with pytest.raises(RewardError, match="written into its worker's socket"):
        Scorer([RewardSpec(f"{file}:grade")])


ASKED = {"number": 1, "completions": [["a", "b"]]}


REPLIES = [
    {"rewards": [1.0], "extras": {}, "metrics": {}},
    {"rewards": [1.0, "1"], "extras": {}, "metrics": {}},
    {"rewards": [1.0, {"kind": "raised"}], "extras": {}, "metrics": {}},
    {"rewards": [1.0, 2.0], "extras": {"x": [1]}, "metrics": {}},
    {"rewards": [1.0, 2.0], "extras": {}, "metrics": {"x": "1"}},
    {"kind": "raised"},
]


@pytest.mark.parametrize("reply", REPLIES)
def test_an_answer_has_the_lengths_and_types_that_were_asked_for(reply):
    with pytest.raises(BadReply, match="another form"):
        read_reply(json.dumps(reply | {"number": 1}).encode(), ASKED)

"""`quartet environment test`: what it finds, what it says, and its exit codes."""

import contextlib
import json
import re
import subprocess
import sys
from io import StringIO

import pytest

from grpo.cli.commands import environment_test as module
from grpo.cli.commands.environment_test import AFTER_BAD_CALLS, EMPTY, GOLD, ODD, Stage, check_environment
from grpo.cli.config.environment_test import EnvironmentTestConfig
from grpo.cli.parse import main
from policies.presets import small_tokenizer
from rewards import RewardError
from rewards.commands.printer import show
from rewards.config.options import load
from rewards.console import Terminal
from rewards.isolation import pool
from rollout.sampling import EnvironmentSpec

SOURCE = '''
import os, random, time

KEPT, PLAYED = [], []


class Number:
    """Guess a number; a demonstration wins."""

    def reset(self, secret: int, **columns) -> str:
        self.secret, self.score, self.done = secret, 0.0, False
        return f" From 1 to 9, and {random.randrange(10)}."

    def guess(self, number: int, why: str = "") -> str:
        """Guess the number.

        Args:
            number: The guess.
            why: A reason.
        """
        self.score, self.done = float(number == self.secret), number == self.secret
        return self._answer(number)

    def _answer(self, number):
        return f"{'higher' if number < self.secret else 'lower'} {random.randrange(100)}"

    def get_reward(self) -> float:
        return self.score

    @staticmethod
    def _demonstration(secret, **columns):
        return [("guess", {"number": 5}), ("guess", {"number": secret})]


class Wrong(Number):
    @staticmethod
    def _demonstration(secret, **columns):
        return ["guess"]


class Prints(Number):
    def get_reward(self):
        print("scored", self.score)
        return self.score


class Free(Number):
    def get_reward(self):
        return 1.0


class Never(Number):
    def get_reward(self):
        return 0.0


class Fragile(Number):
    """A bad call, which the environment never sees, cannot hurt it; the turns that it reads can."""

    def get_reward(self, turns):
        return self.score if turns[0].get("tool_calls") else 0.0


class NaN(Number):
    def get_reward(self):
        return float("nan")


class Hangs(Number):
    def _answer(self, number):
        if number == 10**18:
            time.sleep(60)
        return super()._answer(number)


class Raises(Number):
    def _answer(self, number):
        if number < 1:
            raise ValueError("from 1 on")
        return super()._answer(number)


class Leaks(Number):
    """What one episode said reaches the others."""

    def reset(self, secret: int, **columns) -> str:
        PLAYED.append(secret)
        return super().reset(secret)

    def _answer(self, number):
        return f"{super()._answer(number)} after {len(PLAYED)} games"


class Shares(Number):
    """The two games of a row count their guesses together."""

    guesses = {}

    def reset(self, secret: int, **columns) -> str:
        self.guesses[secret] = 0
        return super().reset(secret)

    def _answer(self, number):
        self.guesses[self.secret] += 1
        return f"{super()._answer(number)}, guess {self.guesses[self.secret]}"


class Differs(Number):
    def reset(self, secret: int, **columns) -> str:
        return super().reset(secret) + str(time.perf_counter_ns())


class Unordered(Number):
    def _answer(self, number):
        return " ".join({"higher", "lower", "right", "near", "far"})


class BeginsUnordered(Number):
    def reset(self, secret: int, **columns) -> str:
        super().reset(secret)
        return " ".join({"higher", "lower", "right", "near", "far"})


class Hoards(Number):
    def reset(self, secret: int, **columns) -> str:
        KEPT.append(bytearray(os.urandom(1 << 19)))
        return super().reset(secret)


def double(text: str) -> str:
    """Say it twice.

    Args:
        text: What to say.
    """
    return text * 2
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environments")
    (folder / "own.py").write_text(SOURCE)
    rows = [{"question": f"Game {i}: my number?", "secret": i + 2, "answer": f"{i + 2}"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Nothing is played for the sake of memory."""
    monkeypatch.setattr("grpo.cli.commands.environment_test.MANY", 0)


@pytest.fixture
def tried(folder, monkeypatch):
    """What is found of a class in own.py, on one row, with all scripts or with these."""
    plays = module._plays

    def tried(name, *scripts, **options):
        options = {"data.name": str(folder / "rows.jsonl"), "data.limit": 1, "program_timeout_s": 5.0} | options
        with monkeypatch.context() as patch:
            if scripts:
                patch.setattr(module, "_plays", lambda *given: {name: plays(*given)[name] for name in scripts})
            return check_environment(f"{folder}/own.py:{name}", load(EnvironmentTestConfig, None, options))

    return tried


def test_an_honest_environment_passes_with_max_score_for_its_demonstration(tried):
    check = tried("Number", **{"data.limit": 3})
    assert (check.faults, check.printed, set(check.differing.values())) == ([], "", {0})
    gold, after, empty, bad, *_, endless = check.scripts.values()
    assert (gold["mean"], gold["full"], gold["episodes"], gold["ended"]) == (1.0, 6, 6, {"environment": 6})
    assert (after["mean"], after["refused"], after["calls"]) == (1.0, 24, gold["calls"])
    assert (empty["mean"], empty["calls"], bad["mean"], bad["calls"], bad["refused"]) == (0.0, 0, 0.0, 0, 24)
    assert endless["ended"] == {"max_turns": 6}


@pytest.mark.parametrize(
    ("name", "scripts", "words"),
    [
        ("Free", [GOLD, EMPTY], "empty turn: 2 of 2 episodes get full marks"),
        ("Never", [GOLD], "demonstration: 2 of 2 episodes miss full marks"),
        ("Fragile", [GOLD, AFTER_BAD_CALLS], "after bad calls: the rewards are not those of the demonstration alone"),
        ("NaN", [GOLD], "demonstration: 2 of 2 episodes fail: get_reward gives nan .*/0"),
        ("Leaks", [GOLD], "an episode goes another way one after the other: demonstration: .* after.*/0"),
        ("Shares", [GOLD], "an episode goes another way made anew for each turn: demonstration: .* guess 2"),
        ("Differs", [GOLD], "reset: .*reset gave the rollouts of one group different texts"),
    ],
)
def test_what_an_environment_does_wrong_is_named(tried, name, scripts, words):
    check = tried(name, *scripts)
    lines = [f"{fault.evidence} {fault.where}" for fault in check.faults]
    assert any(re.search(words, line) for line in lines), lines


def test_a_tool_that_raises_is_told_and_no_problem(tried):
    check = tried("Raises", GOLD, ODD)
    assert check.faults == []
    assert sum(script["raised"] for script in check.scripts.values()) > 0


def test_a_tool_that_hangs_is_named_with_its_line_and_is_not_tried_in_every_row(tried):
    check = tried("Hangs", ODD, program_timeout_s=0.3)
    problem = check.faults[0].evidence
    assert len(check.faults) == 1
    assert "1 of 2 episodes fail" in problem or "2 of 2 episodes fail" in problem
    assert "timeout: no result after 0.3 s, stuck at own.py" in problem
    assert check.facts["left out"] == "other scripts and rows, after a failure"


@pytest.mark.parametrize("name", ["BeginsUnordered", pytest.param("Unordered", marks=pytest.mark.slow)])
def test_an_order_that_depends_on_the_hash_seed_is_found(tried, monkeypatch, name):
    monkeypatch.setattr(pool, "subprocess", subprocess)  # copies of this process have its seed
    check = tried(name, GOLD)
    assert [way for way, count in check.differing.items() if count] == ["in another process with another hash seed"]


@pytest.mark.slow
def test_what_is_kept_of_ended_episodes_is_found(tried, monkeypatch):
    monkeypatch.setattr(pool, "subprocess", subprocess)  # a copy would write into memory that other tests have freed
    monkeypatch.setattr("grpo.cli.commands.environment_test.MANY", 200)
    assert [fault.kind for fault in tried("Hoards", EMPTY).faults] == ["memory-leak"]


def test_the_memory_of_other_children_is_not_counted(folder):
    spec = EnvironmentSpec(environments=(("", f"{folder}/own.py:Number"),), max_turns=2)
    stage = Stage(spec, small_tokenizer(["1"]))
    with contextlib.closing(stage.arena):
        before = stage.memory_mib()
        code = "held = bytearray(b'1' * (128 << 20)); print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            during = stage.memory_mib()
            other.communicate(b"\n")
    assert abs(during - before) < 64 < before


def test_a_tool_alone_can_be_tried(tried):
    check = tried("double", EMPTY, ODD)
    assert (check.faults, check.tools) == ([], ["double"])
    assert check.notes[0].kind == "not-shown"


def test_what_cannot_be_loaded_is_refused(tried):
    with pytest.raises(RewardError, match=r"has no class 'Numbr' \(did you mean 'Number'\?\)"):
        tried("Numbr")
    with pytest.raises(ValueError, match=r"_demonstration fails on .*/0: ValueError: .*gives calls such as"):
        tried("Wrong")


def test_the_command_prints_a_table_writes_json_and_exits_by_what_it_found(folder, tmp_path, capsys):
    words = ["environment", "test", "--data", str(folder / "rows.jsonl"), "--data.limit", "1"]
    out = tmp_path / "out.json"
    assert main([*words, f"{folder}/own.py:Free", "--json", str(out)]) == 1
    assert "1. error wrong-accepted: empty turn" in capsys.readouterr().out
    assert json.loads(out.read_text())["scripts"]["empty turn"]["full"] == 2
    assert main(["environment", "test", "word_game", "--data", "word_game", "--data.limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "played one after the other: the same" in shown
    assert "tools: guess" in shown


def test_a_narrow_terminal_shows_every_script_and_printing_is_a_note(tried):
    shown = StringIO()
    check = tried("Prints", GOLD, EMPTY, ODD)
    show(check, Terminal(file=shown, width=80))
    assert all(script in shown.getvalue() for script in check.scripts)
    assert "note prints: it prints: 'scored 1.0" in shown.getvalue()
    assert check.faults == []

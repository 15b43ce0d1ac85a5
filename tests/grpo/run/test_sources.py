"""What a run depends on beside its options: a resume with other modules or files of the user is refused by name."""

import json
import os
import sys
from pathlib import Path

import pytest

from grpo.cli.parse import main
from grpo.run.records import read_events
from grpo.run.stop import Stopped
from grpo.train import train
from rewards.config.options import dump_yaml
from rewards.group_score import RewardFailed

CASES = Path(__file__).parents[2] / "cases"
QUICK = {"warm_start.steps": 0, "eval.limit": 0}

# Each reward, and the file that changes between start and resume.
REWARDS = {
    "a helper's module": (
        {"mine.py": "from helper import mark\ndef f(completions, **_):\n    return [mark(c) for c in completions]\n"},
        "mine.py:f",
        {"helper.py": "def mark(text):\n    return float(len(text))\n"},
    ),
    "a module that is imported late": (
        {"mine.py": "def f(completions, **_):\n    import late\n    return [late.ONE] * len(completions)\n"},
        "mine.py:f",
        {"late.py": "ONE = 1.0\n"},
    ),
    "a module that only a later step imports": (
        {
            "mine.py": "def f(completions, trainer_state, **_):\n"
            "    if trainer_state.global_step:\n"
            "        from later import two\n"
            "    return [1.0] * len(completions)\n"
        },
        "mine.py:f",
        {"later.py": "two = 2\n"},
    ),
    "a module that a module imports": (
        {
            "mine.py": "import first\ndef f(completions, **_):\n    return [first.mark()] * len(completions)\n",
            "first.py": "def mark():\n    import second\n    return second.ONE\n",
        },
        "mine.py:f",
        {"second.py": "ONE = 1.0\n"},
    ),
    "a module whose name is not written": (
        {
            "mine.py": "import importlib\nhelper = importlib.import_module('hel' + 'per')\n"
            "def f(completions, **_):\n    return [helper.ONE] * len(completions)\n"
        },
        "mine.py:f",
        {"helper.py": "ONE = 1.0\n"},
    ),
    "a file that is read when it is loaded": (
        {
            "mine.py": "import json, pathlib\n"
            "TABLE = json.loads(pathlib.Path(__file__).with_name('t.json').read_text())\n"
            "def f(completions, **_):\n    return [TABLE['mark']] * len(completions)\n"
        },
        "mine.py:f",
        {"t.json": '{"mark": 1.0}'},
    ),
    "a file that is read when it is called": (
        {
            "mine.py": "import os\ndef f(completions, **_):\n"
            "    with open(os.path.join(os.path.dirname(__file__), 't.txt')) as file:\n"
            "        return [float(file.read())] * len(completions)\n"
        },
        "mine.py:f",
        {"t.txt": "1.0"},
    ),
    "a file that only one step reads": (
        {
            "mine.py": "import os\nHERE = os.path.dirname(__file__)\n"
            "def f(completions, trainer_state, **_):\n"
            "    if trainer_state.global_step == 0 and trainer_state.max_steps > 1 and len(completions) > 2:\n"
            "        return [float(open(HERE + '/t.txt').read())] * len(completions)\n"
            "    return [1.0] * len(completions)\n"
        },
        "mine.py:f",
        {"t.txt": "1.0"},
    ),
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def change(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text.replace("1.0", "3.0").replace("two = 2", "two = 3").replace("len(text)", "2"))


def stopped(config):
    with pytest.raises(Stopped):
        train(config, stop_after=1)


def refused(config, *names):
    for name in names:
        with pytest.raises(ValueError, match=rf"{name}.*, which is not what it was .*force=True"):
            train(config, resume="auto")


@pytest.mark.parametrize("case", REWARDS)
def test_contract_23_a_resume_with_another_file_of_a_reward_is_refused(case, micro_config, tmp_path):
    files, function, changing = REWARDS[case]
    write(tmp_path, files | changing)
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/{function}"}], **QUICK)
    stopped(config)
    change(tmp_path, changing)
    refused(config, *changing)
    train(config, resume="auto", force=True)
    [event] = [event for event in read_events(tmp_path / "run") if event["event"] == "sources_changed"]
    assert event["files"] == {f"{tmp_path}/{function}": [str(tmp_path / name) for name in changing]}


PACKAGE = {
    "judging/__init__.py": "from .limits import LIMIT\n",
    "judging/limits.py": "LIMIT = 1.0\n",
    "judging/marks.py": "from . import limits\nfrom .deep.table import TABLE\n"
    "def f(completions, **_):\n    from .late import more\n"
    "    return [limits.LIMIT + TABLE + more()] * len(completions)\n",
    "judging/late.py": "def more():\n    return 1.0\n",
    "judging/deep/__init__.py": "",
    "judging/deep/table.py": "from ..limits import LIMIT\nTABLE = 1.0\n",
}


def test_contract_23_relative_imports_of_a_package_count(micro_config, tmp_path, monkeypatch):
    write(tmp_path, PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    config = micro_config(tmp_path / "run", rewards=[{"function": "judging.marks:f"}], **QUICK)
    stopped(config)
    for name in ("judging/limits.py", "judging/late.py", "judging/deep/table.py"):
        change(tmp_path, {name: PACKAGE[name]})
        refused(config, name)
        write(tmp_path, {name: PACKAGE[name]})
    (tmp_path / "judging/__init__.py").write_text("LIMIT = 5\n")
    refused(config, "judging/__init__.py")
    write(tmp_path, PACKAGE)
    train(config, resume="auto")


AGENT = """
import urllib.request, json
from talk import WORDS
def play(base_url, api_key, prompt):
    import rules
    body = json.dumps({"model": "any", "prompt": prompt + WORDS}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(base_url + "/completions", body, headers)) as answer:
        return len(json.loads(answer.read())["choices"][0]["text"]) * rules.weight()
"""
OF_AGENT = {
    "agent.py": AGENT,
    "talk.py": "WORDS = ''\n",
    "rules.py": "import pathlib\n"
    "def weight():\n    return float(pathlib.Path(__file__).with_name('w.txt').read_text())\n",
    "w.txt": "1.0",
}


def test_contract_23_a_resume_with_another_agent_is_refused(micro_config, tmp_path):
    write(tmp_path, OF_AGENT)
    given = {"rewards": [], "rollout.max_completion_tokens": 4, "prompts_per_step": 2, "rollout.group_size": 2}
    config = micro_config(tmp_path / "run", agent=f"{tmp_path}/agent.py:play", **given, **QUICK)
    stopped(config)
    for name, text in {
        "agent.py": AGENT.replace("prompt + WORDS", "prompt[1:] + WORDS"),
        "talk.py": "WORDS = 'so'\n",
        "rules.py": "def weight():\n    return 2.0\n",
        "w.txt": "2.0",
    }.items():
        write(tmp_path, {name: text})
        refused(config, f"agent.py:play uses .*{name}")
        write(tmp_path, OF_AGENT)
    write(tmp_path, {"agent.py": f"# mine\n{AGENT}\ndef unrelated():\n    return 1\n"})
    train(config, resume="auto")


ENVIRONMENT = """
import pathlib
import board
HERE = pathlib.Path(__file__).parent
WORDS = (HERE / "words.txt").read_text().split()

class Game:
    def reset(self, **columns):
        return f"{board.SIDE} {(HERE / 'first.txt').read_text()}"

    def move(self, to: str) -> str:
        '''Moves.

        Args:
            to: where
        '''
        return WORDS[0]

    def get_reward(self):
        return 1.0
"""
OF_ENVIRONMENT = {"game.py": ENVIRONMENT, "board.py": "SIDE = 3\n", "words.txt": "left right", "first.txt": "begin"}


def test_contract_23_a_resume_with_another_environment_is_refused(micro_config, tmp_path):
    write(tmp_path, OF_ENVIRONMENT)
    given = {"environment": f"{tmp_path}/game.py:Game", "rollout.max_completion_tokens": 16}
    config = micro_config(tmp_path / "run", **given, **QUICK)
    stopped(config)
    for name, text in {
        "game.py": ENVIRONMENT.replace("WORDS[0]", "WORDS[1]"),
        "board.py": "SIDE = 4\n",
        "words.txt": "right left",
        "first.txt": "start",
    }.items():
        write(tmp_path, {name: text})
        refused(config, f"game.py:Game uses .*{name}")
        write(tmp_path, OF_ENVIRONMENT)
    train(config, resume="auto")


TOOL = """
from adding import plus
def add(a: int, b: int) -> int:
    '''Adds.

    Args:
        a: one
        b: another
    '''
    return plus(a, b)
"""


def test_contract_23_a_resume_with_another_tool_is_refused(micro_config, tmp_path):
    write(tmp_path, {"tool.py": TOOL, "adding.py": "def plus(a, b):\n    return a + b\n"})
    config = micro_config(tmp_path / "run", tools=[f"{tmp_path}/tool.py:add"], **QUICK)
    stopped(config)
    write(tmp_path, {"adding.py": "def plus(a, b):\n    return a + b + 1\n"})
    refused(config, "tool.py:add uses .*adding.py")
    write(tmp_path, {"adding.py": "def plus(a, b):\n    return a + b\n", "tool.py": TOOL.replace("(a, b)", "(b, a)")})
    refused(config, "tool.py:add uses .*tool.py")


LOSS = """
from grpo import advantage
from scales import scale

@advantage
def centred(rewards_PG):
    return (rewards_PG - rewards_PG.nanmean(1, keepdim=True)) * scale()
"""


def test_contract_23_a_resume_with_another_advantage_is_refused(micro_config, tmp_path):
    write(tmp_path, {"loss.py": LOSS, "scales.py": "def scale():\n    return 1.0\n"})
    config = micro_config(tmp_path / "run", **{"loss.advantage": f"{tmp_path}/loss.py:centred"}, **QUICK)
    stopped(config)
    write(tmp_path, {"scales.py": "def scale():\n    return 2.0\n"})
    refused(config, "loss.py:centred uses .*scales.py")
    write(tmp_path, {"scales.py": "def scale():\n    return 1.0\n", "loss.py": LOSS.replace("* scale()", "/ scale()")})
    refused(config, "loss.py:centred uses .*loss.py")


def test_contract_23_a_function_of_this_process_counts(micro_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, {"of_script.py": "BONUS = 1.0\ndef f(completions, **_):\n    return [BONUS] * len(completions)\n"})
    from of_script import f

    config = micro_config(tmp_path / "run", **QUICK)
    with pytest.raises(Stopped):
        train(config, reward=f, stop_after=1)
    write(tmp_path, {"of_script.py": "BONUS = 2.0\ndef f(completions, **_):\n    return [BONUS] * len(completions)\n"})
    del sys.modules["of_script"]
    from of_script import f

    with pytest.raises(ValueError, match=r"python:f uses .*of_script.py, which is not what it was"):
        train(config, reward=f, resume="auto")


READS = """
import pathlib
from helper import one
HERE = pathlib.Path(__file__).parent

def f(completions, **_):
    (HERE / "log.txt").open("a").write("called ")
    seen = HERE / "seen.txt"
    before = seen.read_text() if seen.exists() else ""
    seen.write_text(before + "x")
    return [one() + len((HERE / "t.txt").read_text())] * len(completions)
"""
HELPER = "def one():\n    return 1.0\n"


def test_contract_23_the_same_content_goes_on(micro_config, tmp_path):
    """A new date, a comment and a file that the reward itself writes are no changes; a file that is gone is one."""
    write(tmp_path, {"mine.py": READS, "helper.py": HELPER, "t.txt": "abc", "seen.txt": "before", "unread.txt": "a"})
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/mine.py:f"}], **QUICK)
    stopped(config)
    (tmp_path / "t.txt").rename(tmp_path / "elsewhere.txt")
    with pytest.raises((ValueError, RewardFailed), match=r"t\.txt"):
        train(config, resume="auto")
    (tmp_path / "elsewhere.txt").rename(tmp_path / "t.txt")
    write(tmp_path, {"helper.py": f"# one\n{HELPER}", "unread.txt": "b", "seen.txt": "other", "log.txt": ""})
    os.utime(tmp_path / "t.txt")
    with pytest.raises(Stopped):
        train(config, resume="auto", stop_after=2)
    write(tmp_path, {"t.txt": "abcd"})
    refused(config, "t.txt")  # whose date is newer than the start of the run that goes on


def test_a_run_of_an_older_version_goes_on_and_is_recorded(micro_config, tmp_path):
    write(tmp_path, {"mine.py": READS, "helper.py": HELPER, "t.txt": "abc"})
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/mine.py:f"}], **QUICK)
    stopped(config)
    (tmp_path / "run/sources.json").unlink()
    write(tmp_path, {"helper.py": HELPER.replace("1.0", "2.0")})
    with pytest.raises(Stopped):
        train(config, resume="auto", stop_after=2)
    write(tmp_path, {"helper.py": HELPER})
    refused(config, "helper.py")


FAILS = "from helper import one\ndef f(completions, **_):\n    return [one(c) for c in completions]\n"
FAULT = "import os\nCALLS = []\ndef one(text):\n    CALLS.append(1)\n    return 1.0 if len(CALLS) < 25 else 1 / 0\n"


def test_the_mended_helper_of_a_reward_that_failed_goes_on(micro_config, tmp_path):
    write(tmp_path, {"mine.py": FAILS, "helper.py": FAULT})
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/mine.py:f"}], **QUICK)
    with pytest.raises(RewardFailed, match="division by zero"):
        train(config)
    write(tmp_path, {"helper.py": "def one(text):\n    return 1.0\n"})
    with pytest.raises(Stopped):
        train(config, resume="auto", stop_after=2)
    events = [event["event"] for event in read_events(tmp_path / "run")]
    assert "reward_mended" in events
    assert "sources_changed" not in events
    write(tmp_path, {"helper.py": "def one(text):\n    return 2.0\n"})
    refused(config, "helper.py")  # it has not failed since


def test_contract_20_a_dry_run_refuses_it_too(micro_config, tmp_path, capsys):
    write(tmp_path, {"mine.py": READS, "helper.py": HELPER, "t.txt": "abc"})
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/mine.py:f"}], **QUICK)
    stopped(config)
    write(tmp_path, {"t.txt": "abcd"})
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert main(["train", str(tmp_path / "run.yaml"), "--dry_run", "--resume", "auto"]) == 1
    assert "t.txt, which is not what it was" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_record_of_files_names_itself(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **QUICK)
    stopped(config)
    (tmp_path / "run/sources.json").write_text(json.dumps({"letters": 3}))
    with pytest.raises(ValueError, match=r"sources.json is no record of files"):
        train(config, resume="auto")

"""What a run depends on beside its options: a resume with other modules or files of the user is refused by name."""

import json
import os
import sys

import pytest

from grpo.cli.parse import main
from grpo.run.sources import Source, Sources, read_sources
from grpo.run.stop import Stopped
from grpo.train import train
from review.readers.run_folder import read_events
from rewards.config.options import dump_yaml
from rewards.group_score import RewardFailed
from rewards.opened import listing, opened_by

QUICK = {"sft.steps": 0, "eval.limit": 0, "rollout.max_completion_tokens": 4}
QUICK |= {"prompts_per_step": 2, "rollout.group_size": 4}

# Rewards, a tool and an advantage; what they use; and the files that count.
FILES = {
    "imports.py": "from helper import mark\ndef imports(completions, **_):\n"
    "    return [mark(c) for c in completions]\n",
    "helper.py": "def mark(text):\n    return 1.0\n",
    "imports_late.py": "def imports_late(completions, **_):\n"
    "    import late\n    return [late.ONE] * len(completions)\n",
    "late.py": "ONE = 1.0\n",
    "imports_later.py": "def imports_later(completions, trainer_state, **_):\n"
    "    if trainer_state.global_step:\n        from later import two\n"
    "    return [1.0] * len(completions)\n",
    "later.py": "two = 1.0\n",
    "chain.py": "import first\ndef chain(completions, **_):\n    return [first.mark()] * len(completions)\n",
    "first.py": "def mark():\n    import second\n    return second.ONE\n",
    "second.py": "ONE = 1.0\n",
    "unnamed.py": "import importlib\nbuilt = importlib.import_module('bu' + 'ilt')\n"
    "def unnamed(completions, **_):\n    return [built.ONE] * len(completions)\n",
    "built.py": "ONE = 1.0\n",
    "loads.py": "import json, pathlib\n"
    "TABLE = json.loads(pathlib.Path(__file__).with_name('loaded.json').read_text())\n"
    "def loads(completions, **_):\n    return [TABLE['mark']] * len(completions)\n",
    "loaded.json": '{"mark": 1.0}',
    "reads.py": "import os\ndef reads(completions, **_):\n"
    "    with open(os.path.join(os.path.dirname(__file__), 'read.txt')) as file:\n"
    "        return [float(file.read())] * len(completions)\n",
    "read.txt": "1.0",
    "reads_once.py": "import os\nHERE = os.path.dirname(__file__)\n"
    "def reads_once(completions, trainer_state, **_):\n"
    "    if trainer_state.global_step == 0 and trainer_state.max_steps > 1 and len(completions) > 2:\n"
    "        return [float(open(HERE + '/once.txt').read())] * len(completions)\n"
    "    return [1.0] * len(completions)\n",
    "once.txt": "1.0",
    "judging/__init__.py": "from .limits import LIMIT\nHERE = 1.0\n",
    "judging/limits.py": "LIMIT = 1.0\n",
    "judging/marks.py": "from . import limits\nfrom .deep.table import TABLE\n"
    "def f(completions, **_):\n    from .more import more\n"
    "    return [limits.LIMIT + TABLE + more()] * len(completions)\n",
    "judging/more.py": "def more():\n    return 1.0\n",
    "judging/deep/__init__.py": "",
    "judging/deep/table.py": "from ..limits import LIMIT\nTABLE = 1.0\n",
    "tool.py": "from adding import plus\ndef add(a: int, b: int) -> int:\n"
    "    '''Adds.\n\n    Args:\n        a: one\n        b: another\n    '''\n    return plus(a, b) * 1.0\n",
    "adding.py": "def plus(a, b):\n    return a + b + 1.0\n",
    "loss.py": "from grpo import advantage\nfrom scales import scale\n@advantage\ndef centred(rewards_PG):\n"
    "    return (rewards_PG - rewards_PG.nanmean(1, keepdim=True)) * scale() * 1.0\n",
    "scales.py": "def scale():\n    return 1.0\n",
}
USED = {
    "imports.py:imports": ["helper.py"],
    "imports_late.py:imports_late": ["late.py"],
    "imports_later.py:imports_later": ["later.py"],
    "chain.py:chain": ["second.py"],
    "unnamed.py:unnamed": ["built.py"],
    "loads.py:loads": ["loaded.json"],
    "reads.py:reads": ["read.txt"],
    "reads_once.py:reads_once": ["once.txt"],
    "judging.marks:f": ["judging/__init__.py", "judging/deep/table.py", "judging/limits.py", "judging/more.py"],
    "tool.py:add": ["adding.py", "tool.py"],
    "loss.py:centred": ["loss.py", "scales.py"],
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def stopped(config, step=1, **given):
    with pytest.raises(Stopped):
        train(config, stop_after=step, **given)


def refused(config, function, *names):
    with pytest.raises(ValueError, match=rf"{function} uses .*, which is not what it was .*force=True") as error:
        train(config, resume="auto")
    assert [name for name in names if f"/{name}" not in str(error.value)] == []


def test_contract_23_a_resume_with_another_file_of_a_function_is_refused(micro_config, tmp_path, monkeypatch):
    """Of each of them, whichever way the function has it: all that have changed are named."""
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, FILES)
    functions = [name if name.startswith("judging") else f"{tmp_path}/{name}" for name in USED]
    *rewards, tool, advantage = functions
    given = {"rewards": [{"function": function} for function in rewards]}
    given |= {"tools": [tool], "loss.advantage": advantage, "rollout.max_completion_tokens": 16}
    config = micro_config(tmp_path / "run", **QUICK | given)
    stopped(config)
    changing = [name for names in USED.values() for name in names]
    write(tmp_path, {name: FILES[name].replace("1.0", "3.0") for name in changing})
    refused(config, "", *changing)
    write(tmp_path, FILES)
    stopped(config, 2, resume="auto")
    write(tmp_path, {name: FILES[name].replace("1.0", "3.0") for name in changing})
    train(config, resume="auto", force=True)
    [event] = [event for event in read_events(tmp_path / "run") if event["event"] == "sources_changed"]
    found = {function: sorted(paths) for function, paths in event["files"].items()}
    expected = zip(functions, USED.values(), strict=True)
    assert found == {function: [str(tmp_path / name) for name in names] for function, names in expected}


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
OTHERS_OF_AGENT = {
    "agent.py": AGENT.replace("prompt + WORDS", "prompt[1:] + WORDS"),
    "talk.py": "WORDS = 'so'\n",
    "rules.py": "def weight():\n    return 2.0\n",
    "w.txt": "2.0",
}
GAME = """
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
OF_GAME = {"game.py": GAME, "board.py": "SIDE = 3\n", "words.txt": "left right", "first.txt": "begin"}
OTHERS_OF_GAME = {
    "game.py": GAME.replace("WORDS[0]", "WORDS[1]"),
    "board.py": "SIDE = 4\n",
    "words.txt": "right left",
    "first.txt": "start",
}


@pytest.mark.parametrize(
    ("option", "function", "files", "others"),
    [
        ("agent", "agent.py:play", OF_AGENT, OTHERS_OF_AGENT),
        ("environment", "game.py:Game", OF_GAME, OTHERS_OF_GAME),
    ],
)
def test_contract_23_a_resume_with_another_agent_or_environment_is_refused(
    micro_config, tmp_path, option, function, files, others
):
    write(tmp_path, files)
    given = {option: f"{tmp_path}/{function}"}
    given |= {"rewards": []} if option == "agent" else {"rollout.max_completion_tokens": 16}
    config = micro_config(tmp_path / "run", **QUICK | {"rollout.group_size": 2} | given)
    stopped(config)
    write(tmp_path, others)
    refused(config, function, *others)
    own = function.partition(":")[0]
    write(tmp_path, files | {own: f"# mine\n{files[own]}\ndef unrelated():\n    return 1\n"})
    stopped(config, 2, resume="auto")


def test_contract_23_a_function_of_this_process_counts(micro_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, {"of_script.py": "BONUS = 1.0\ndef f(completions, **_):\n    return [BONUS] * len(completions)\n"})
    from of_script import f

    config = micro_config(tmp_path / "run", **QUICK)
    stopped(config, reward=f)
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


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory):
    """The configuration of a run that was stopped, in the folder of its reward; tests put its files back."""
    folder = tmp_path_factory.mktemp("reads")
    write(folder, {"mine.py": READS, "helper.py": HELPER, "t.txt": "abc", "seen.txt": "before", "unread.txt": "a"})
    config = micro_config(folder / "run", rewards=[{"function": f"{folder}/mine.py:f"}], **QUICK)
    stopped(config)
    return config


def test_contract_20_a_dry_run_refuses_it_too_and_a_damaged_record_names_itself(run, capsys):
    folder = run.output_dir.parent
    write(folder, {"t.txt": "abcd", "run.yaml": dump_yaml(run)})
    assert main(["train", str(folder / "run.yaml"), "--dry_run", "--resume", "auto"]) == 1
    assert "t.txt, which is not what it was" in " ".join(capsys.readouterr().err.split())
    write(folder, {"t.txt": "abc"})
    record = folder / "run/sources.json"
    kept = record.read_text()
    record.write_text(json.dumps({"letters": 3}))
    with pytest.raises(ValueError, match=r"sources.json is no record of files"):
        train(run, resume="auto")
    record.write_text(kept)


def test_contract_23_the_same_content_goes_on(run):
    """A new date, a comment and a file that the reward itself writes are no changes; a file that is gone is one. A run
    of an older version, which has no record, goes on and is recorded."""
    folder = run.output_dir.parent
    (folder / "t.txt").rename(folder / "elsewhere.txt")
    with pytest.raises((ValueError, RewardFailed), match=r"t\.txt"):
        train(run, resume="auto")
    (folder / "elsewhere.txt").rename(folder / "t.txt")
    write(folder, {"helper.py": f"# one\n{HELPER}", "unread.txt": "b", "seen.txt": "other", "log.txt": ""})
    os.utime(folder / "t.txt")
    stopped(run, 2, resume="auto")
    write(folder, {"t.txt": "abcd"})
    refused(run, "", "t.txt")  # whose date is newer than the start of the run that goes on
    (folder / "run/sources.json").unlink()
    train(run, resume="auto")
    write(folder, {"helper.py": HELPER.replace("1.0", "2.0")})
    refused(run, "", "helper.py")


def test_contract_23_a_file_that_is_newer_than_the_run_counts_as_it_was_read(tmp_path):
    """It was left out, as if the run had made it. What is gone once the step is over was made by the run."""
    first, second, gone, kept = (tmp_path / name for name in ("first.txt", "second.txt", "gone.txt", "kept.txt"))
    kept.write_text("old")
    function = "mine.py:f"
    with listing() as opened:
        later = opened.since + 10**9
        sources = Sources([Source(function)], opened)
        sources.record(tmp_path)
        for path in (first, second, gone):
            path.write_text("as it was read")
            os.utime(path, ns=(later, later))
        os.utime(kept, ns=(1, 1))
        with opened_by(function):
            for path in (first, second, gone, kept):
                path.read_text()
        gone.unlink()
        for path in (second, kept):  # before the run looks
            path.write_text("changed")
            os.utime(path, ns=(later + 1, later + 1))
        sources.keep_up(tmp_path)
        assert read_sources(tmp_path)[function].keys() == {str(path) for path in (first, second, kept)}
        assert sources.changed(tmp_path) == {function: [str(second), str(kept)]}
        with opened_by(function):
            second.read_text()
        sources.keep_up(tmp_path)
        assert sources.changed(tmp_path) == {function: [str(kept)]}


FAILS = "from helper import one\ndef f(completions, **_):\n    return [one(c) for c in completions]\n"
FAULT = "import os\nCALLS = []\ndef one(text):\n    CALLS.append(1)\n    return 1.0 if len(CALLS) < 12 else 1 / 0\n"


def test_the_mended_helper_of_a_reward_that_failed_goes_on(micro_config, tmp_path):
    write(tmp_path, {"mine.py": FAILS, "helper.py": FAULT})
    config = micro_config(tmp_path / "run", rewards=[{"function": f"{tmp_path}/mine.py:f"}], **QUICK)
    with pytest.raises(RewardFailed, match="division by zero"):
        train(config)
    write(tmp_path, {"helper.py": "def one(text):\n    return 1.0\n"})
    stopped(config, 2, resume="auto")
    events = [event["event"] for event in read_events(tmp_path / "run")]
    assert "reward_mended" in events
    assert "sources_changed" not in events
    write(tmp_path, {"helper.py": "def one(text):\n    return 2.0\n"})
    refused(config, "", "helper.py")  # it has not failed since

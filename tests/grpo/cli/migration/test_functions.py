"""References to functions of scripts: those of a script that would train when it is imported are copied out of it."""

import ast
import subprocess
import sys
from pathlib import Path

from grpo.cli.migration.functions import Functions
from rewards.registry import load_reward

UNGUARDED = """
from __future__ import annotations
import math
from helpers import scale
from trl import GRPOTrainer

LIMIT = 10
TABLE = {}
TABLE.update(a=1)

def length(completion):
    return min(len(completion), LIMIT)

def short(completions, **_):
    return [scale(math.sqrt(length(c)) + TABLE["a"]) for c in completions]

open("trained", "w").close()
GRPOTrainer("model", reward_funcs=[short]).train()

def main(reward):
    raise SystemExit("trains")

main(short)
"""


def fact(script: Path, name: str, module: str = "") -> dict:
    return {"file": str(script.resolve()), "name": name, "module": module}


def test_a_script_that_trains_when_it_is_imported_lends_a_copy_of_what_is_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED)
    (tmp_path / "helpers.py").write_text("def scale(x):\n    return 2 * x\n")
    functions = Functions(script, tmp_path / "data")
    reference = functions.reference(fact(script, "short"))
    assert reference == "data/functions.py:short"
    assert functions.write()
    text = (tmp_path / "data/functions.py").read_text()
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert defined == {"length", "short"}
    assert "trl" not in text
    code = f"from rewards.registry import load_reward; print(load_reward({reference!r})(completions=['a' * 16]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[{2 * (10**0.5 + 1)}]"
    assert not (tmp_path / "trained").exists()


def test_a_script_behind_a_guard_is_referred_to_itself(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        '"""Trains."""\nLIMIT = 3\ndef short(completions, **_):\n    return [+(len(c) < LIMIT) for c in completions]\n'
        "if __name__ == '__main__':\n    inner = lambda completions, **_: []\n    GRPOTrainer(short).train()\n"
    )
    functions = Functions(script, tmp_path / "data")
    reference = functions.reference(fact(script, "short"))
    assert reference == f"{script}:short"
    assert load_reward(reference)(completions=["ab", "abcd"]) == [1.0, 0.0]
    assert functions.reference(fact(script, "inner")) is None  # it is there only while the script runs
    assert functions.reference({"text": "make.<locals>.reward"}) is None
    assert not functions.write()


def test_a_function_of_a_package_is_imported_from_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("x = 1\n")
    functions = Functions(script, tmp_path / "data")
    other = tmp_path / "mine.py"
    assert functions.reference(fact(other, "grade")) == f"{other}:grade"
    reference = functions.reference(fact(other, "think_format_reward", "trl.rewards.format_rewards"))
    assert reference == "trl.rewards.format_rewards:think_format_reward"
    assert load_reward(reference)(completions=[[{"content": "<think>\na\n</think>\nb"}]]) == [1.0]
    assert not functions.write()

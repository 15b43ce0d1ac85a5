"""Lines that a user writes for a reward, an environment, a resume and a loss. Each program is counted, and is run.

The programs are in `written/`. Lines of code are those that are neither blank, nor comment, nor docstring. For peers
that cannot be installed on this machine nothing is counted: `READ` says what their sources ask for.
"""

from __future__ import annotations

import ast
import difflib
import io
import shutil
import sys
import tempfile
import tokenize
from pathlib import Path
from typing import Any

from benchmarks.peers.process import clean, run

WRITTEN = Path(__file__).parent / "written"
TASKS: dict[str, dict[str, list[str]]] = {
    "a reward": {"ours": ["reward.py", "reward.yaml"], "trl": ["reward.py"]},
    "an environment": {"ours": ["environment.py", "environment.yaml"], "trl": ["environment.py"]},
    "a resume": {"ours": ["reward.py", "reward.yaml"], "trl": ["resume.py"]},
    "a loss": {"ours": ["reward.py", "loss.py", "loss.yaml"], "trl": ["loss.py"]},
}
QUARTET = [sys.executable, "-m", "grpo", "train"]
COMMANDS: dict[tuple[str, str], list[list[str]]] = {
    ("a reward", "ours"): [[*QUARTET, "reward.yaml"]],
    ("an environment", "ours"): [[*QUARTET, "environment.yaml"]],
    ("a resume", "ours"): [[*QUARTET, "reward.yaml", "--steps", "1"], [*QUARTET, "reward.yaml", "--resume", "auto"]],
    ("a loss", "ours"): [[*QUARTET, "loss.yaml"]],
    ("a reward", "trl"): [[sys.executable, "reward.py"]],
    ("an environment", "trl"): [[sys.executable, "environment.py"]],
    ("a resume", "trl"): [[sys.executable, "reward.py"], [sys.executable, "resume.py"]],
    ("a loss", "trl"): [[sys.executable, "loss.py"]],
}
READ = {
    "verl": {
        "a reward": "`compute_score(data_source, solution_str, ground_truth, extra_info)` in a file, and two options "
        "with its path and name (`custom_reward_function`)",
        "an environment": "a subclass of `AgentLoopBase`: `run(...) -> AgentLoopOutput(prompt_ids, response_ids, "
        "response_mask)`",
        "a loss": "a function with `@register_policy_loss(name)`, in verl's own process",
    },
    "SkyRL": {
        "an environment": "a subclass of `BaseTextEnv`: `step(action)` gives observations, reward, done, metadata"
    },
    "prime-rl": {
        "a reward": "part of an environment of the package verifiers",
        "an environment": "an installable package for verifiers, named in the configuration",
        "a loss": "a function `LossInputs -> LossOutputs`, named in the configuration",
    },
}


def code_lines(file: Path) -> list[str]:
    """The lines with code of a Python or YAML file, as they are written."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    if file.suffix != ".py":
        return [line for line in lines if line.strip() and not line.strip().startswith("#")]
    kept: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            kept.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            kept -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return [line for number, line in enumerate(lines, 1) if number in kept and line.strip()]


def count(task: str, side: str, folder: Path = WRITTEN) -> dict[str, Any]:
    """Lines of the whole program, and those that the program with a reward does not have."""
    whole = [line for name in TASKS[task][side] for line in code_lines(folder / side / name)]
    first = [line for name in TASKS["a reward"][side] for line in code_lines(folder / side / name)]
    new = [line for line in difflib.ndiff(first, whole) if line.startswith("+ ")]
    return {"files": TASKS[task][side], "lines": len(whole), "beyond_the_reward": len(new)}


def measure(data: Path, seconds: float, sides: tuple[str, ...] = ("ours", "trl")) -> dict[str, Any]:
    """Count and run every program; `data` holds the model and the rows that `model.write` makes."""
    found: dict[str, Any] = {}
    for task in TASKS:
        for side in sides:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                shutil.copytree(data, folder, dirs_exist_ok=True)
                for name in {*TASKS[task][side], *TASKS["a reward"][side]}:
                    shutil.copy(WRITTEN / side / name, folder)
                record = count(task, side) | {"ran": True, "seconds": 0.0}
                for command in COMMANDS[task, side]:
                    ended = run(command, seconds, cwd=folder)
                    record["seconds"] = round(record["seconds"] + ended.seconds, 1)
                    if ended.code != 0:
                        record |= {"ran": False, "code": ended.code, "last_line": clean(ended.last_line, folder)[:300]}
                        break
            found.setdefault(task, {})[side] = record
            print(f"{task}, {side}: {record}", flush=True)
    return {"counted": found, "read_and_not_run": READ}

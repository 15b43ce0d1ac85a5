"""25 misconfigurations from public issues, given to `quartet rehearse`: each must be named; a sound one is silent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from copies import Copy
from misconfigurations import CASES, command, configuration, named, script, write

ROOT = Path(__file__).parents[3]
IN_CI = {"gold_does_not_score": "yaml", "missing_column": "trl", "format_never_matches": "verl"}
# What verl's command does not say: the memory of its devices (--device_gib).
UNSEEN = ("memory_too_small", "verl")


def form_of(number: int, name: str) -> str:
    """The three forms in turn. What sets them apart is read by grpo/cli/migration, which has tests of its own."""
    case = CASES[name]
    kinds = {"yaml": case.options, "trl": case.trl, "verl": case.verl}
    forms = [form for form, changes in kinds.items() if changes is not None and (name, form) != UNSEEN]
    return IN_CI.get(name) or forms[number % len(forms)]


def rehearse(path: Path) -> tuple[int, str]:
    """What `quartet rehearse` says of a configuration, a script or a command line: a copy of this process, which has
    torch and transformers already, in the case's folder."""
    known = {"PYTHONPATH": f"{ROOT}{os.pathsep}{path.parent}"}
    words = [sys.executable, "-m", "grpo", "rehearse", path.name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = Copy(words, cwd=path.parent, env=os.environ | known, **pipes)
    try:
        said, _ = process.communicate()
    finally:
        process.kill()
    return process.returncode, said


def problems(said: str) -> str:
    """The findings of a report, each in a line with its change and its options."""
    findings = re.split(r"^[0-9]+\. ", said, flags=re.MULTILINE)[1:]
    lines = [re.sub(r"\n   ", " ", finding).partition("\n")[0] for finding in findings]
    return "\n".join(re.sub(r"^note ", "note (a warning) ", line) for line in lines)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form_of(number, name), marks=pytest.mark.slow if name in IN_CI else pytest.mark.long)
        for number, name in enumerate(CASES)
    ],
)
def test_a_misconfiguration_is_named(copied_scripts, name, form, tmp_path):
    code, said = rehearse(write(name, tmp_path / "case")[form])
    line = named(CASES[name], code, problems(said))
    assert line, said
    assert code or line.startswith("note"), "a report with a problem ends with an exit code for CI"


@pytest.mark.slow
def test_a_sound_configuration_draws_nothing(copied_scripts, tmp_path):
    for path in write("sound", tmp_path / "case").values():
        code, said = rehearse(path)
        assert code == 0, said


def test_each_case_has_a_public_issue_and_compiles():
    assert len(CASES) == 25
    for name, case in CASES.items():
        assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", case.issue), name
        re.compile(case.says)
        assert case.options is not None or case.trl is not None or case.verl is not None
        compile(script(case), name, "exec")
        assert configuration(case)["model"] == "model"
        assert command(case).startswith("python3 -m verl.trainer.main_ppo ")

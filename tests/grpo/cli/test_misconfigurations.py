"""25 misconfigurations from public issues, given to `quartet rehearse`: each must be named; a sound one is silent."""

import re

import pytest
from misconfigurations import CASES, command, configuration, named, rehearse, script, write

from grpo.cli.parse import _commands

exists = pytest.mark.skipif("rehearse" not in _commands(), reason="`quartet rehearse` does not exist yet")
FORMS = [
    (name, form)
    for name, case in CASES.items()
    for form, changes in (("yaml", case.options), ("trl", case.trl), ("verl", case.verl))
    if changes is not None
]


def problems(said: str) -> str:
    """The part of a report that says what is wrong; the rehearsal joins here, once it has a form of its own for it."""
    return said


@exists
@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_misconfiguration_is_named(name, form, tmp_path):
    forms = write(name, tmp_path / name)
    code, said = rehearse(forms[form])
    assert named(CASES[name], problems(said)), said
    assert code, "a report with a problem ends with an exit code for CI"


@exists
@pytest.mark.slow
@pytest.mark.parametrize("form", ["yaml", "trl", "verl"])
def test_a_sound_configuration_draws_nothing(form, tmp_path):
    code, said = rehearse(write("sound", tmp_path / "sound")[form])
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

"""25 misconfigurations from public issues, given to `quartet rehearse`: each must be named; a sound one is silent."""

import re

import pytest
from misconfigurations import CASES, command, configuration, named, rehearse, script, write

# What verl's command does not say: the memory of its devices (--device_gib).
UNSEEN = [("memory_too_small", "verl")]
IN_CI = [("gold_does_not_score", "yaml"), ("missing_column", "trl"), ("format_never_matches", "verl")]
FORMS = [
    pytest.param(
        *(name, form),
        marks=[
            *[pytest.mark.xfail(strict=True, reason="the command does not say it")] * ((name, form) in UNSEEN),
            pytest.mark.slow if (name, form) in IN_CI else pytest.mark.long,
        ],
    )
    for name, case in CASES.items()
    for form, changes in (("yaml", case.options), ("trl", case.trl), ("verl", case.verl))
    if changes is not None
]


def problems(said: str) -> str:
    """The part of a report that says what is wrong."""
    return "\n".join(line for line in said.splitlines() if line.startswith(("ends", "spoils", "warns")))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_misconfiguration_is_named(name, form, tmp_path):
    forms = write(name, tmp_path / "case")
    code, said = rehearse(forms[form])
    line = named(CASES[name], code, problems(said))
    assert line, said
    assert code or line.startswith("warns"), "a report with a problem ends with an exit code for CI"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["yaml", "trl", "verl"])
def test_a_sound_configuration_draws_nothing(form, tmp_path):
    code, said = rehearse(write("sound", tmp_path / "case")[form])
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

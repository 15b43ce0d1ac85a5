"""One report as text, as JSON, as a page and as an exit code."""

from io import StringIO

import pytest

from rewards.commands.printer import as_json, exit_code, page, show
from rewards.console import Terminal
from rewards.finding import Report, found
from rewards.kinds import NOTE


class Row:
    place = "rollouts.jsonl:6"

    def as_row(self):
        return {"reward": 0.5, "error": None, "completion": "<b>4</b>\x1b[31m"}


def text_of(report):
    shown = StringIO()
    show(report, Terminal(file=shown, width=200))
    return shown.getvalue()


@pytest.fixture
def report():
    findings = [
        found("clipped", "half of them", severity=NOTE, change=""),
        found("tied-groups", "nine of ten", ["step 3", "step 4"]),
        found("advantage-sign", "3 of 8 groups", [Row()] * 5),
    ]
    tables = {"by step": [{"step": 1, "mean": 0.123456}, {"step": 2, "mean": None}]}
    lacking = {"log-probabilities": ["bad-logprobs"]}
    return Report("8 rollouts", findings, {"length": 9.87654}, tables, {"run": "a"}, lacking)


def test_causes_come_before_symptoms_and_notes_last(report):
    lines = text_of(report).splitlines()
    heads = [line for line in lines if line[:2] in ("1.", "2.", "3.")]
    assert heads == [
        "1. error advantage-sign: 3 of 8 groups",
        "2. warning tied-groups: nine of ten",
        "3. note clipped: half of them",
    ]
    row = "   At: rollouts.jsonl:6: reward 0.5, completion '<b>4</b>\\x1b[31m'"
    assert lines[lines.index(heads[0]) + 1 :][:6] == [
        "   Cause: worse answers are raised",
        "   Change: turn the sign",
        *[row] * 3,
        "   and 2 more",
    ]
    assert "   At: step 3, step 4" in lines
    assert lines[-2:] == ["   Cause: completions are truncated", "1 error, 1 warning, 1 note"]


def test_what_was_read_is_said(report):
    text = text_of(report)
    assert text.startswith("8 rollouts\nlength: 9.877\n")
    assert "0.1235" in text
    assert "not recorded: log-probabilities; not looked for: bad-logprobs" in text
    assert text_of(Report("nothing")) == "nothing\nNothing was found.\n"


def test_json_has_the_rows_and_what_only_it_has(report):
    written = as_json(report)
    first = written["findings"][0]
    assert (first["kind"], first["severity"], first["count"], len(first["where"])) == ("advantage-sign", "error", 5, 5)
    assert first["where"][0] == {"place": Row.place, "reward": 0.5, "error": None, "completion": "<b>4</b>\x1b[31m"}
    assert (written["run"], written["lacking"]) == ("a", {"log-probabilities": ["bad-logprobs"]})


def test_the_page_shows_text_as_text(report):
    html = page(report)
    assert "8 rollouts: 1 error, 1 warning, 1 note" in html
    assert "<pre>&lt;b&gt;4&lt;/b&gt;" in html
    assert "error None" not in html


def test_notes_end_with_0(report):
    assert exit_code(report) == 1
    assert exit_code(Report("a", report.findings[:1])) == 0
    assert exit_code(Report("a", report.findings[1:2])) == 1

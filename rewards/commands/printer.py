"""How every instrument's report is shown: as text, as JSON, as a page, and by the exit code."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards.commands.command_line import EXIT_ERROR, write
from rewards.console import Terminal, visible
from rewards.finding import Case, Finding, Report, row_of

PLACES, SHOWN = 3, 20  # rows of a finding: in the terminal, and on the page
CUT, TEXTS = 120, ("prompt", "completion", "text")  # characters of a text in the terminal
LONG = 80  # characters; the page shows longer values by themselves
NUMBER = re.compile(r"[-+]?[0-9.]*(?:e[-+]?[0-9]+)?%?")  # or nothing, or a dash
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>quartet</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f5; padding: .6rem; margin: .3rem 0 }}
summary {{ cursor: pointer; padding: .3rem 0 }} article {{ border-top: 1px solid #ddd; padding: .6rem 0 }}
code {{ font-weight: 600 }} p {{ color: #555 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{facts}</p>
{body}
</body>
</html>
"""


def publish(report: Report, args: argparse.Namespace) -> int:
    """Prints the report, writes the files that were asked for, and returns the exit code."""
    show(report, Terminal())
    write(args.json, as_json(report))
    html = getattr(args, "html", None)
    if html is not None:
        html.write_text(page(report), encoding="utf-8", errors="backslashreplace")
        print(f"written to {html}")
    return exit_code(report)


def exit_code(report: Report) -> int:
    """1 if a finding is more than a note."""
    return EXIT_ERROR if report.faults else 0


def show(report: Report, console: Console) -> None:
    """Prints what was read, then the findings, each with its rows and the change to make first."""
    _say(console, report.title)
    for name, value in report.facts.items():
        _say(console, f"{name}: {_words(value)}")
    for title, rows in report.tables.items():
        if rows:
            console.print(_table(title, rows, console.encoding))
    for lacking, kinds in report.lacking.items():
        _say(console, f"not recorded: {lacking}; not looked for: {', '.join(kinds)}")
    for number, finding in enumerate(report.in_order, start=1):
        for line in lines(finding):
            _say(console, f"{number}. {line}" if line[:1] != " " else line)
    _say(console, summary(report))


def text_of(report: Report) -> str:
    """The faults of a report, for the message of an error."""
    every = [line for finding in report.in_order if finding.is_fault for line in lines(finding)]
    return "\n  ".join([report.title, *every])


def lines(finding: Finding) -> list[str]:
    """The finding in lines: what it rests on, its cause, the first change, and its first rows."""
    text = [f"{finding.severity} {finding.kind}: {finding.evidence}"]
    text += [f"   {name}: {words}" for name, words in (("Cause", finding.cause), ("Change", finding.change)) if words]
    keys = [where for where in finding.where if isinstance(where, str)]
    rows = [where for where in finding.where if not isinstance(where, str)]
    more = [f"and {len(finding.where) - PLACES} more"] if len(finding.where) > PLACES else []
    if keys:
        text.append(f"   At: {', '.join([*keys[:PLACES], *more])}")
    text += [f"   At: {row.place}: {_shortly(row)}" for row in rows[:PLACES]]
    return [*text, f"   {more[0]}"] if rows and more else text


def _shortly(row: Case) -> str:
    """What a row has, but for what is empty and for lists."""
    shown = {name: value for name, value in row.as_row().items() if value not in (None, "") or name == "completion"}
    texts = {name: f"'{visible(value, CUT)}'" for name, value in shown.items() if name in TEXTS}
    return _words(shown | texts)


def summary(report: Report) -> str:
    """How many findings there are of each severity, in words."""
    counts = Counter(finding.severity for finding in report.in_order)
    words = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts.items()]
    return ", ".join(words) or "Nothing was found."


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _table(title: str, rows: Any, encoding: str) -> Table:
    """Numbers stand at the right, and are whole on a narrow terminal, as the first column is."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        is_number = all(NUMBER.fullmatch(_words(row.get(name, ""))) for row in rows)
        is_whole = is_number or name == names[0]
        table.add_column(name, overflow="fold", justify="right" if is_number else "left", no_wrap=is_whole)
    for row in rows:
        table.add_row(*(Text(visible(_words(row.get(name, "")), 400, encoding)) for name in names))
    return table


def _say(console: Console, text: str) -> None:
    words = visible(text.replace("\n", " "), 2000, console.encoding)
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def as_json(report: Report) -> dict[str, Any]:
    """What --json writes: what was read, and the findings with up to 200 rows each."""
    read = {"title": report.title, "facts": report.facts, "tables": report.tables, "lacking": report.lacking}
    return {**read, "findings": [finding.as_json() for finding in report.in_order], **report.own()}


def page(report: Report) -> str:
    """One HTML file without scripts, whose text is that of the rows and nothing else."""
    facts = "; ".join(f"{name}: {_words(value)}" for name, value in report.facts.items())
    body = "\n".join(map(_section, report.in_order)) or "<p>Nothing was found.</p>"
    title = f"{report.title}: {summary(report)}"
    return PAGE.format(title=escape(title), facts=escape(facts), body=body)


def _section(finding: Finding) -> str:
    rows = "\n".join(_article(row_of(where)) for where in finding.where[:SHOWN])
    more = f"<p>and {len(finding.where) - SHOWN} more</p>" if len(finding.where) > SHOWN else ""
    head = f"<summary>{finding.severity} <code>{escape(finding.kind)}</code> {escape(finding.evidence)}</summary>"
    words = f"<p>{escape(finding.cause)}. Change: {escape(finding.change)}.</p>"
    return f"<details>{head}{words}\n{rows}\n{more}</details>"


def _article(row: dict[str, Any]) -> str:
    texts = {name: _words(value) for name, value in row.items() if value not in (None, "")}
    long = [name for name, text in texts.items() if name in TEXTS or len(text) > LONG]
    line = ", ".join(f"{name} {text}" for name, text in texts.items() if name not in long)
    blocks = "".join(f"<pre>{escape(texts[name])}</pre>" for name in long)
    return f"<article>{escape(line)}{blocks}</article>"

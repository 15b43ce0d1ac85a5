"""Prints docs/reference.md, which `make reference` writes: what `quartet reference` says, with each option once."""

import contextlib
import io
import re
from collections import Counter

from grpo.cli.parse import main

PAGE = """\
# Options and metrics

This page has every option once, and then every metric. Each option stands in the section that it has in a
configuration, after those that have none; on a command line it is written `--learner.learning_rate 1e-5`, in a file as
`learner: {{learning_rate: 1.0e-5}}`. The row of a section says which commands take its options, and another row says
so where they are others. Where commands differ, the command is named before what it has.
`quartet COMMAND --help all` lists the options of one command. This page is made from the source by `make reference`.

Sections: {sections}.

## Options

<div class="options" markdown>

| key | type | default | meaning |
|---|---|---|---|
{options}

</div>

## Metrics

<div class="options" markdown>

{metrics}
</div>
"""
ROW = re.compile(r"^\| `(?P<key>[^`]+)` \| (?P<cells>.*) \|$", re.MULTILINE)
CELLS = re.compile(r"(?<!\\)\|")

Rows = dict[str, tuple[str, str, str]]  # of one option: what each command has as its type, its default and its meaning


def options_of(tables: dict[str, str]) -> dict[str, Rows]:
    """The rows of each option; a section that says nothing but its name is none."""
    options: dict[str, Rows] = {}
    for command, table in tables.items():
        for row in ROW.finditer(table):
            kind, default, meaning = (cell.strip() for cell in CELLS.split(row["cells"] + " "))
            if meaning:
                options.setdefault(row["key"], {})[command] = (kind, default, meaning)
    return options


def section_of(key: str, keys: list[str]) -> str:
    """`rollout` for `rollout.vllm.url`, `rewards` for `rewards[].weight` and `rewards`, "" for `steps`."""
    first = re.split(r"\[\]|\.", key)[0]
    return first if any(re.match(rf"{first}(\[\])?\.", other) for other in keys) else ""


def differing(cells: dict[str, str]) -> str:
    """`8; mtp: 4`: what most commands have, then what the others have."""
    usual = Counter(cells.values()).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for command, cell in cells.items():
        if cell != usual:
            others.setdefault(cell, []).append(command)
    end = " " if usual.endswith(".") else "; "
    return end.join([usual, *(f"{', '.join(commands)}: {cell}" for cell, commands in others.items())])


def anchor(name: str, level: int = 6) -> str:
    """A name as a heading of its own inside a table, so that the site's search leads to its row."""
    number = ", d such as 1, 2, 4, 8" if "<d>" in name else ""
    return f'<h{level} id="{re.sub("[<>]", "", name)}">`{name}`{number}</h{level}>'


def rows_of(section: str, options: dict[str, Rows], everyone: list[str]) -> list[str]:
    """The rows of a section: first its own, with the commands that take most of its options."""
    commands = {key: "all commands" if len(rows) == len(everyone) else ", ".join(rows) for key, rows in options.items()}
    usual = Counter(commands.values()).most_common(1)[0][0] if section else ""
    lines = [f"| {anchor(f'{section}:', 3)} | | | *For {usual}.* |"] if section else []
    for key, rows in options.items():
        cells = [differing(dict(zip(rows, column, strict=True))) for column in zip(*rows.values(), strict=True)]
        takers = f" *For {commands[key]}.*" if commands[key] != usual else ""
        lines.append(f"| {anchor(key)} | {' | '.join(cells)}{takers} |")
    return lines


def choices(code: re.Match) -> str:
    r"""`int\|null ≥ 1` in a table, which only some readers of Markdown understand, as `int` or `null`, `≥ 1`."""
    names, limit = re.fullmatch(r"(.*?)(?: ((?:[<>≥≤]|length) ?.*))?", code[1]).groups()
    return " or ".join(f"`{name}`" for name in names.split(r"\|")) + (f", `{limit}`" if limit else "")


def page() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["reference"])
    tables = dict(re.findall(r"^# ([^\n]+)\n\n(.*?)(?=^# |\Z)", printed.getvalue(), flags=re.MULTILINE | re.DOTALL))
    metrics = ROW.sub(lambda row: f"| {anchor(row['key'])} | {row['cells']} |", tables.pop("Metrics"))
    everyone = [name.removeprefix("quartet ") for name in tables]
    options = options_of(dict(zip(everyone, tables.values(), strict=True)))
    sections: dict[str, dict[str, Rows]] = {"": {}}
    for key, rows in options.items():
        sections.setdefault(section_of(key, list(options)), {})[key] = rows
    text = PAGE.format(
        sections=", ".join(f"[`{name}`](#{name}:)" for name in sections if name),
        options="\n".join(line for name, rows in sections.items() for line in rows_of(name, rows, everyone)),
        metrics=metrics,
    )
    return re.sub(r"`([^`\n]*\\\|[^`\n]*)`", choices, text)


if __name__ == "__main__":
    print(page(), end="")

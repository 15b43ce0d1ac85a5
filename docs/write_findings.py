"""Prints docs/guides/findings.md, which `make reference` writes: the table of rewards/kinds.py as a page."""

from rewards.kinds import Kind, sections

PAGE = """\
# Findings

`diagnose`, `audit`, `reward test`, `reward replay`, `environment test`, `check`, `rehearse`, `--dry_run`, `why` and the
alarms report findings of these kinds, causes before symptoms. Exit code 1: at least one error or warning.

- **error**: the result is not what was meant.
- **warning**: the run learns less, or nothing.
- **note**: it may be meant.

`--json` writes `kind`, `severity`, `evidence`, `cause`, `change` and `where`. Each row below has an honest and a faulty
example.

{sections}
"""
HEAD = "|kind|cause|change first|honest|faulty|\n|---|---|---|---|---|"


def row(name: str, kind: Kind) -> str:
    words = "|".join(text.replace("|", "\\|") for text in (kind.meaning, kind.change, kind.honest, kind.faulty))
    return f"|`{name}`, {kind.severity}|{words}|"


def page() -> str:
    tables = []
    for title, kinds in sections().items():
        rows = "\n".join(row(name, kind) for name, kind in kinds.items())
        tables.append(f"## {title}\n\n{HEAD}\n{rows}")
    return PAGE.format(sections="\n\n".join(tables))


if __name__ == "__main__":
    print(page(), end="")

"""Prints docs/guides/combinations.md, which `make reference` writes: grpo/task/table.yaml as a page of the site."""

import re

from grpo.task.table import FORMS, content

PAGE = """\
# What goes with what

Everything can be combined except the pairs below. Every command checks its whole configuration before anything is
loaded, and reports all contradictions at once; so does `--dry_run`. `make reference` writes this page from
`grpo/task/table.yaml`.

| this | does not go with | since; instead |
|---|---|---|
{rows}

{packages}.
"""


def words(names: str) -> str:
    """`rollout.backend=transformers|vllm, agent` as they are written in a file, of which each is meant."""
    return ", ".join(name if name in FORMS else choices(name) for name in names.split(", "))


def choices(what: str) -> str:
    key, sign, values = re.split(r"(!?=|$)", what, maxsplit=1)
    if sign == "!=":
        return f"`{key}` other than `{values}`"
    return f"`{key}: {values.replace('|', '` or `')}`" if sign else f"`{key}`"


def page() -> str:
    rows = [
        f"| {words(this)} | {words(others)} | {why} |"
        for this, row in content()["not_with"].items()
        for others, why in row.items()
    ]
    packages = [
        f"{words(what)} needs the extra `{extra}` ({', '.join(names.split())})"
        for what, (names, extra, _) in content()["packages"].items()
    ]
    return PAGE.format(rows="\n".join(rows), packages="; ".join(packages))


if __name__ == "__main__":
    print(page(), end="")

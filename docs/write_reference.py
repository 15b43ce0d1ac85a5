"""Prints docs/reference.md, which `make reference` writes: what `quartet reference` says, as one page of the site."""

import contextlib
import io
import re

from grpo.cli.parse import main

INTRODUCTION = """\
# Options and metrics

This page lists every option of every command, then every metric. It is made from the source by `make reference`. On a
command line an option is written `--learner.learning_rate 1e-5`, in a file as `learner: {learning_rate: 1.0e-5}`.
"""


def choices(code: re.Match) -> str:
    r"""`int\|null ≥ 1` in a table, which only some readers of Markdown understand, as `int` or `null`, `≥ 1`."""
    names, limit = re.fullmatch(r"(.*?)(?: ((?:[<>≥≤]|length) ?.*))?", code[1]).groups()
    return " or ".join(f"`{name}`" for name in names.split(r"\|")) + (f", `{limit}`" if limit else "")


def page() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["reference"])
    text = re.sub(r"^# ", "## ", printed.getvalue(), flags=re.MULTILINE)
    table = re.compile(r"^\| (?:key|metric) \|.*?(?=\n\n|\n*\Z)", re.DOTALL | re.MULTILINE)
    text = table.sub(r'<div class="options" markdown>\n\n\g<0>\n\n</div>', text)  # for narrow screens, see site.css
    return INTRODUCTION + "\n" + re.sub(r"`([^`\n]*\\\|[^`\n]*)`", choices, text)


if __name__ == "__main__":
    print(page(), end="")

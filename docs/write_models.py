"""Prints docs/models.md, which `make models` writes: how a tiny model of every causal type of transformers is read.

The models are those of tests/zoo. The slow tests compare the page with what they find.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import __version__ as version

from grpo.source.agreement import by_learner, by_sampler, check_agreement
from policies.policy import PolicyError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

PAGE = """\
# Which models

transformers {version} has {known} types of causal language models. {exact} of them train here: sampler and learner
give the log-probabilities of the model's own forward, row by row. This page is made by `make models` from a tiny model
of each type with wide random weights in float32, whose windows, chunks and blocks are shorter than the rows tried.
[`quartet check`](guides/check.md) does the same, and more, with the configuration of a model of yours.

"Our cache" and "once" are the fastest; see [Any model](guides/any-model.md). The numbers are the largest differences
of a log-probability.

| type | sampled by | prompts are read | sampler | learner |
|---|---|---|---|---|
{rows}

These are refused by name:

| type | why |
|---|---|
{refused}
"""
SAMPLERS = {"own": "our cache", "joined": "transformers' cache", "apart": "transformers' cache, by length"}
SAMPLERS |= {"whole": "no cache"}
READ = {"packed": "once", "alone": "with each completion"}


def row_of(kind: str) -> tuple[bool, str]:
    """Whether a type trains, and its row of the table that says so."""
    try:
        policy = zoo.policy(kind)
        check_agreement(policy)
    except PolicyError as error:
        reason = str(error).split("cannot be trained here: ")[-1].split(". Llama, Qwen")[0].replace("|", "\\|")
        return False, f"| `{kind}` | {reason.splitlines()[0]} |"
    ways = f"{SAMPLERS[policy.paths.sampler]} | {READ[policy.paths.rows]}"
    differences = [(ours - own).abs().max().item() for ours, own in (by_sampler(policy), by_learner(policy))]
    return True, f"| `{kind}` | {ways} | {differences[0]:.0e} | {differences[1]:.0e} |"


def page() -> str:
    rows: dict[bool, list[str]] = {True: [], False: []}
    for kind in zoo.kinds():
        trains, row = row_of(kind)
        rows[trains].append(row)
    rows[False] += [f"| `{kind}` | {why} |" for kind, why in zoo.refused().items()]
    return PAGE.format(
        version=version,
        known=len(zoo.kinds()) + len(zoo.refused()),
        exact=len(rows[True]),
        rows="\n".join(rows[True]),
        refused="\n".join(rows[False]),
    )


if __name__ == "__main__":
    print(page(), end="")

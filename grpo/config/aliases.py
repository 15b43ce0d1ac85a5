"""What TRL, transformers' Trainer, verl and unsloth call an option, and what it is here: the table is aliases.yaml."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from pathlib import Path

from grpo.config.yaml_file import parse_yaml


@cache
def table(part: str) -> dict[str, str]:
    """`means`, `not_supported` or `removed_commands`: a name that is none, and what is said about it."""
    content = parse_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[part]
    return {name: said for said, names in content.items() for name in names}


def hint(name: str, known: Collection[str]) -> str | None:
    """What to say to somebody who gave `name`, an option of another trainer, to a command that has the `known` ones.

    None where the name is no other trainer's, or means something that this command does not have.

    >>> hint("num_generations", ["steps", "rollout.group_size"])
    'did you mean rollout.group_size?'
    >>> hint("top_p", [])[:22]
    'not supported, because'
    """
    section, dot, _ = name.partition(".")
    part, said = _entry([name.split(".", start)[start] for start in range(name.count(".") + 1)])
    if part == "not_supported":
        return f"not supported, because {said}"
    keys, _, note = said.partition("; ")
    found = next((key for target in keys.split() for key in _here(target, known)), None)
    if found and dot and (own := f"{section}.{found.rpartition('.')[2]}") in known:
        found = own  # mtp.lr is mtp.learning_rate
    return found and f"did you mean {found}?" + (f" ({note})" if note else "")


def _entry(ends: Sequence[str]) -> tuple[str, str]:
    """The part of the table that has one of these names, and what it says. A whole name goes before a beginning."""
    parts = ("means", "not_supported")
    whole = ((part, said) for end in ends for part in parts if (said := table(part).get(end)))
    begun = ((p, said) for end in ends for p in parts for name, said in table(p).items() if fnmatchcase(end, name))
    return next(chain(whole, begun), ("means", ""))


def _here(target: str, known: Collection[str]) -> list[str]:
    """The options of this command that may be what `target`, an option of `quartet train`, is there; the best first."""
    if target.startswith("--"):
        return [target]
    last = target.rpartition(".")[2]
    return [key for key in (target, f"head.{last}", f"recovery.{last}", last) if key in known]

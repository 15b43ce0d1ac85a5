"""What is wrong with a configuration, said so that it can be put right: key, value, place, way out."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from grpo.yaml_file import Place, show_place, to_yaml


def describe(key: str, value: Any, where: str, what: str) -> str:
    """`describe("steps", "x", "command line", "expected …")` is `steps=x (command line): expected …`.

    A mapping is not shown: it may be long.
    """
    got = "" if isinstance(value, Mapping) else f"={to_yaml(value, inline=True)}"
    got = f"{got[:60]}…" if len(got) > 61 else got
    return f"{key}{got}{f' ({where})' if where else ''}: {what}"


def unknown_option(key: str, value: Any, where: str, names: Iterable[str]) -> str:
    """Suggests the nearest name; one that ends alike is nearer than one that only looks alike."""
    wanted = re.sub(r"\[\d+\]", "[]", key).replace("-", "_")
    alike = [name for name in names if name.split(".")[-1] == wanted.split(".")[-1]]
    nearest = difflib.get_close_matches(wanted, alike, n=1, cutoff=0.0)
    nearest = nearest or difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help for all options"
    return describe(key, {} if value is None else value, where, f"no such option; {hint}")


class Source(NamedTuple):
    """What the user wrote, where it stands, and what could have been written."""

    file: Path | None
    lines: Mapping[Place, int]
    overrides: Mapping[str, Any]  # {"rollout.group_size": 8}, from the command line
    names: list[str]  # every dotted key of the model
    flags: list[str]  # the command line's other options

    def where(self, place: Place) -> str:
        """`command line`, `demo.yaml, line 3`, or nothing for a default."""
        paths = [tuple(key.split(".")) for key in self.overrides]
        if any(place[: len(path)] == path for path in paths):
            return "command line"
        for length in range(len(place), 0, -1):
            if place[:length] in self.lines:
                return f"{self.file}, line {self.lines[place[:length]]}"
        return "command line" if any(path[: len(place)] == place for path in paths) else ""

    def unknown(self, place: Place, value: Any) -> list[str]:
        typed = [key for key in self.overrides if tuple(key.split("."))[: len(place)] == place]
        names = [*self.names, *self.flags]
        problems = [unknown_option(key, self.overrides[key], "command line", names) for key in typed]
        if place in self.lines or not typed:
            problems.append(unknown_option(show_place(place), value, self.where(place), self.names))
        return problems

    def place(self, loc: Place, data: Any) -> Place:
        """pydantic's place of an error in `data`, without the tags that it adds for members of a union."""
        place: Place = ()
        for part in loc:
            longer = (*place, part)
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                if re.sub(r"\[\d+\]", "[]", show_place(longer)) not in self.names:
                    break
                data = None
            place = longer
        return place

    def explain(self, errors: Iterable[ErrorDetails], data: Any) -> list[str]:
        """One line per place; what the members of a union expect is joined by "or"."""
        problems: dict[str, list[str]] = {}
        for error in errors:
            place, value, kind = self.place(error["loc"], data), error["input"], error["type"]
            key, where = show_place(place), self.where(place)
            message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
            if kind == "extra_forbidden":
                problems |= {line: [] for line in self.unknown(place, value)}
            elif kind == "missing":
                problems[describe(key, {}, where, "is required")] = []
            elif kind == "value_error" and message.startswith(key):  # the validator has named it all
                problems[f"{message} ({where})" if where else message] = []
            else:
                message = "expected a mapping of options" if kind in ("model_type", "dict_type") else message
                problems.setdefault(describe(key, value, where, ""), []).append(message)
        return [head + " or ".join(dict.fromkeys(whats)) for head, whats in problems.items()]

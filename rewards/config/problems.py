"""What is wrong with a configuration, said so that it can be put right: key, value, place, way out."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from rewards.config.names import hint, removed
from rewards.config.yaml_file import Place, show_place, to_yaml

SIMILAR = 0.7  # of 1: below it a suggestion misleads
# What a program calls a flag of the command line, which it hands over as an argument.
_IN_PYTHON = {
    r"did you mean --resume\?( \(on the command line, [^)]*\))?": 'did you mean train(config, resume="auto")?',
    r"`?--resume auto --force`?": 'resume="auto", force=True',
    r"`?--resume auto`?": 'resume="auto"',
    r"--force\b": "force=True",
    r"--(resume|stop_after)\b": r"\1",
    r"see --help all for all options": "`quartet reference` prints all options",
}
_commands = 0


def describe(key: str, value: object, where: str, what: str) -> str:
    """`describe("steps", "x", "command line", "expected …")` is `steps=x (command line): expected …`.

    A mapping is not shown: it may be long.
    """
    got = "" if isinstance(value, Mapping) else f"={to_yaml(value, inline=True)}"
    got = f"{got[:60]}…" if len(got) > 61 else got
    return f"{key}{got}{f' ({where})' if where else ''}: {what}"


def unknown_option(
    key: str, value: object, where: str, names: Iterable[str], command: str = "", elsewhere: Collection[str] = ()
) -> str:
    """About an unknown option: our name for another trainer's option, or why we have none, or the nearest name, or that
    this command has no use for it."""
    query = re.sub(r"\[\d+\]", "[]", key).replace("-", "_")
    names = list(names)
    way_out = removed(query) or hint(query, names) or _nearest(query, names)
    what = way_out if way_out.startswith(("not supported", "it is gone")) else f"no such option; {way_out}"
    if query in elsewhere and not way_out.startswith("it is gone"):
        what = f"quartet {command} does not use it; {hint(query, names) or 'leave it out'}"
    return describe(key, {} if value is None else value, where, what)


def _nearest(query: str, names: list[str]) -> str:
    """A name that ends alike is nearer than one that only looks alike. Several that end alike are all shown."""
    last = query.rpartition(".")[2]
    alike = [name for name in names if name.rpartition(".")[2] == last]
    if "." in query:
        matches = difflib.get_close_matches(query, alike, n=1, cutoff=0.5)
        matches = matches or difflib.get_close_matches(query, names, n=1, cutoff=SIMILAR)
        matches = [m for m in matches if difflib.SequenceMatcher(None, m.rpartition(".")[2], last).ratio() >= 0.5]
    else:
        ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in names}, n=1, cutoff=SIMILAR)
        matches = alike or difflib.get_close_matches(query, names, n=1, cutoff=SIMILAR)
        matches = matches or [name for name in names if name.rpartition(".")[2] in ends]
    shown = [name for name in matches if "[]" not in name] or matches  # an item of a list has no option of its own
    if not shown or len(shown) > 4:
        return "see --help all for all options"
    return f"did you mean {' or '.join([', '.join(shown[:-1]), shown[-1]] if shown[1:] else shown)}?"


def _leaves(place: Place, value: object) -> Iterator[tuple[Place, Any]]:
    """`value` at its place, then what is inside it, if it is a mapping."""
    yield place, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*place, key), inner)


class Source(NamedTuple):
    """What the user wrote, where it was written, and what could have been written."""

    file: Path | None
    lines: Mapping[Place, int]
    overrides: Mapping[str, Any]  # {"rollout.group_size": 8}, from the command line
    names: list[str]  # every dotted key of the model
    flags: list[str]  # the command line's other options
    command: str = ""  # `sft` of `quartet sft`
    elsewhere: Collection[str] = ()  # the options of other commands

    def where(self, place: Place) -> str:
        """`command line`, `demo.yaml, line 3`, or nothing for a default."""
        paths = [tuple(key.split(".")) for key in self.overrides]
        if any(place[: len(path)] == path for path in paths):
            return "command line"
        for length in range(len(place), 0, -1):
            if place[:length] in self.lines:
                return f"{self.file}, line {self.lines[place[:length]]}"
        return "command line" if any(path[: len(place)] == place for path in paths) else ""

    def unknown(self, place: Place, value: object) -> list[str]:
        typed = [key for key in self.overrides if tuple(key.split("."))[: len(place)] == place]
        names = [*self.names, *self.flags]
        problems = [
            unknown_option(key, self.overrides[key], "command line", names, self.command, self.elsewhere)
            for key in typed
        ]
        if place in self.lines or not typed:
            leaves = list(_leaves(place, value))
            # A section of another trainer, or one that has options which are gone, is told by its options.
            foreign = any(hint(show_place(leaf), self.names) or removed(show_place(leaf)) for leaf, _ in leaves[1:])
            for leaf, content in leaves[1:] if foreign else leaves[:1]:
                if not foreign or not isinstance(content, Mapping):
                    problems.append(
                        unknown_option(
                            show_place(leaf), content, self.where(leaf), self.names, self.command, self.elsewhere
                        )
                    )
        return problems

    def place(self, loc: Place, data: Any) -> Place:
        """pydantic's place of an error in `data`, without the tags that it adds for members of a union."""
        place: Place = ()
        for part in loc:
            if part == 0 and isinstance(data, Mapping):  # the one item of a list, without the list
                continue
            longer = (*place, part)
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                if re.sub(r"\[\d+\]", "[]", show_place(longer)) not in self.names:
                    break
                data = None
            place = longer
        return place

    def explain(self, errors: Iterable[ErrorDetails], data: object) -> list[str]:
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


def in_python(message: str) -> str:
    """Names arguments of Python in place of flags.

    >>> in_python("stopped after step 3; go on with --resume auto")
    'stopped after step 3; go on with resume="auto"'
    """
    for flag, argument in _IN_PYTHON.items():
        message = re.sub(flag, argument, message)
    return message


@contextmanager
def command_line() -> Iterator[None]:
    """Marks that a command calls what programs may call too: inside it messages keep their flags."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


@contextmanager
def python_words() -> Iterator[None]:
    """Surrounds a function that programs call: what it raises names arguments in place of flags."""
    try:
        yield
    except BaseException as error:  # also a stop
        if not _commands:
            error.args = tuple(in_python(part) if isinstance(part, str) else part for part in error.args)
        raise

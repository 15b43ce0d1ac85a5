"""The state of a shell that is read: its variables, what it has started, and what it cannot decide."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import NoReturn, Self

from grpo.cli.migration.shell_tree import Node

MARK = re.compile("\ue000([?0*|])(\\w*)\ue001(.*?)\ue002", re.S)
UNKNOWN, UNSET, SECRET, CHOICE = "?0*|"
IS_SECRET = re.compile("KEY|TOKEN(?!S|_LEN)|SECRET|PASS")  # variables whose values are not written
OF_MACHINE = {"HOSTNAME", "RANDOM", "SECONDS", "UID", "EUID", "OSTYPE"}
DEEPEST = 50
MOST_WORK = 1_000_000  # characters that a script expands, 10 for each part of a word and 100 for a statement
Value = str | list[str] | dict[str, str]
"""A variable's: a text, or the elements of an array by number or by name."""


def mark(source: str, name: str = "", kind: str = UNKNOWN) -> str:
    """A text of which only the source is known, and the variable that would give it."""
    return f"\ue000{kind}{name}\ue001{source}\ue002"


def is_known(text: str) -> bool:
    return "\ue000" not in text


def names_in(text: str) -> list[str]:
    """The variables that would give what is not known; a text without a variable is named as it is written."""
    return [name or source for _, name, source in MARK.findall(text)]


def shown(text: str) -> str:
    """The text with the source of what is not known.

    >>> shown("a" + mark("$(hostname)"))
    'a$(hostname)'
    """
    return MARK.sub(r"\3", text)


def is_empty(text: str) -> bool | None:
    """Whether a text is empty, as far as that is known; a secret is not."""
    if MARK.sub(lambda found: found[2] * (found[1] == SECRET), text):
        return False
    return None if text else True


def how_to_give(name: str) -> str:
    """How a person gives a variable or an argument that a script needs."""
    if name.isdigit():
        return f"run `quartet from-verl 'bash SCRIPT.sh ARGUMENTS'` with argument {name}"
    if name.isidentifier():
        return f"run `{name}=VALUE quartet from-verl SCRIPT.sh`"
    return "run `quartet from-verl 'bash SCRIPT.sh KEY=VALUE'` with the options that it changes"


class Ended(Exception):
    """`exit`, or a command that fails under `set -e`."""


class Left(Exception):
    """`break`, `continue` or `return`: which, and how many loops of it are left."""

    def __init__(self, word: str, levels: int = 1):
        super().__init__(word)
        self.word, self.levels = word, levels


class Undecided(ValueError):
    """A condition or an output that only a program or the machine decides."""

    def __init__(self, line: int, cause: str, way_out: str):
        self.line, self.cause = line, cause
        self.source = " ".join(shown(cause).split())
        self.way_out = way_out
        super().__init__(self.sentence())

    def sentence(self, *names: str, effect: str = "") -> str:
        """Which line it is, with the variables that would decide it."""
        causes = (*names, *names_in(self.cause))
        variables = [name for name in causes if name.isidentifier() or name.isdigit()]
        ways = [*map(how_to_give, dict.fromkeys(variables)), self.way_out]
        problem = f"`{self.source}` cannot be decided without running it{effect}"
        return f"line {self.line} of the shell text: {problem}; {', or '.join(ways)}"


class State:
    """The variables of one shell, and where it is."""

    def __init__(self, programs: Sequence[str], environment: Mapping[str, str], file: Path | None = None):
        self.programs, self.program = programs, programs[0]  # those that are looked for, and the one to name
        self.given = {name: value for name, value in environment.items() if not IS_SECRET.search(name)}
        self.variables: dict[str, Value] = {name: mark(f"${name}", name) for name in OF_MACHINE}
        self.variables |= {"PWD": os.getcwd(), "OPTIND": "1"} | self.given
        for name in environment.keys() - self.given.keys():
            self.variables[name] = environment[name] and mark(f"${name}", name, SECRET)
        self.exported = {*environment, "PWD"}
        self.arguments: list[str] = []
        self.functions: dict[str, Node] = {}
        self.hidden: list[dict[str, Value | None]] = []  # of each function that is called: what its locals hide
        self.commands: list[list[str]] = []  # arguments of each command that has the program
        self.notes: dict[str, None] = {}
        self.choices: dict[str, Undecided] = {}  # the conditions that nobody can decide, by their text
        self.ends: list[str] = []
        self.status: bool | None = True
        self.code = "1"  # of a status that is a failure
        self.cause = ""  # of a status that is not known
        self.output: list[str] | None = None  # what a substitution writes; None: nobody reads it
        self.input: Node | None = None  # the here-document or the text that a command reads
        self.printed, self.source, self.line = "", "", 0
        self.fails_at_once = self.refuses_unset = self.misses_source = False
        self.waits = False  # whether it is in a loop that only `break` ends
        self.has_substituted = False  # whether the status of an assignment is that of a substitution
        self.assigned = ""  # the variable whose value is being read
        self.asked: list[str] = []  # the variable whose value depends on a module
        self.depth = 0
        self.work = [0]  # of MOST_WORK, by this shell and all its copies
        self.file = self.script = str(file or "bash")

    def copy(self) -> Self:
        """A shell within this one: what it sets, this one does not see."""
        self.spend(len(self.variables))
        inner = copy(self)
        inner.variables, inner.functions = dict(self.variables), dict(self.functions)
        inner.hidden = [dict(names) for names in self.hidden]
        return inner

    def trial(self) -> Self:
        """A copy whose notes, commands and output do not count yet."""
        inner = self.copy()
        inner.notes, inner.commands = dict(self.notes), list(self.commands)
        inner.output = None if self.output is None else list(self.output)
        inner.asked, inner.ends = list(self.asked), list(self.ends)
        return inner

    def take_status(self, other: State) -> None:
        self.status, self.code, self.cause = other.status, other.code, other.cause

    def refuse(self, source: str = "") -> NoReturn:
        """Raises ValueError for what is not read: the statement, or a part of it."""
        source = (source or self.source).splitlines()[0]
        raise ValueError(f"line {self.line} of the shell text: `{source}` is not read; {self.way_out()}")

    def undecided(self, cause: str) -> NoReturn:
        """Refuses a condition, and names the variables that would decide it."""
        raise Undecided(self.line, cause, self.way_out())

    def way_out(self) -> str:
        return f"pass the command itself: paste the words from `python3 -m {self.program}` on"

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def end(self, why: str) -> NoReturn:
        self.ends.append(why)
        raise Ended

    def descend(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            self.refuse("a function or a file that calls itself without end")

    def spend(self, work: int) -> None:
        """Counts work. Refuses a script that doubles its texts or its calls, before it fills the memory or the day."""
        self.work[0] += work
        if self.work[0] > MOST_WORK:
            self.refuse("a script that hardly ends, or that makes very long texts")

    def content(self, path: Path) -> str:
        """The text of a file that the script starts or sources."""
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(MOST_WORK)
        self.spend(len(text) + 5000)  # to read a file takes time, however short it is
        return text

    def path(self, file: str) -> Path:
        return Path(str(self.variables["PWD"])) / Path(file).expanduser()

    # ---- variables

    def assign(self, name: str, value: Value) -> None:
        """Sets a variable. One whose value only a program knows is read from the environment."""
        if name == "IFS":
            self.refuse()
        self.variables[name] = self._given(name, value) if isinstance(value, str) else value

    def _given(self, name: str, value: str) -> str:
        nameless = [source for kind, cause, source in MARK.findall(value) if kind == UNKNOWN and not cause]
        if not nameless:
            return value
        if self.given.get(name):
            self.note(f"{name}={self.given[name]} is read from the environment in place of {nameless[0]}.")
            return self.given[name]
        return MARK.sub(lambda found: mark(found[3], found[2] or name, found[1]), value)

    def missing(self, name: str, source: str, required: bool = False) -> str:
        """The text of a variable that is not set. Where bash would end the script for want of it, a note names it."""
        if required or self.refuses_unset:
            self.note(f"{name} is not set, and bash would end the script for want of it; {how_to_give(name)}.")
            self.variables[name] = mark(source, name)
            return mark(source, name)
        return "" if name == self.assigned else mark(source, name, UNSET)  # `S=$S$x` begins with an empty text

    def settled(self, text: str) -> str:
        """The text for a condition, where a variable that is not set counts as empty, as it does in bash."""
        if self.refuses_unset or self.misses_source:
            return text
        for kind, name, source in MARK.findall(text):
            if kind == UNSET:
                self.note(f"{name} is not set and counts as empty in a condition, as in bash; {how_to_give(name)}.")
                text = text.replace(mark(source, name, UNSET), "")
        return text

    def all(self, name: str) -> list[str]:
        """The elements of an array, none if it is not set."""
        if name in ("@", "*"):
            return self.arguments
        value = self.variables.get(name, [])
        return [value] if isinstance(value, str) else [*value.values()] if isinstance(value, dict) else value

    def get(self, name: str, index: str = "") -> str | None:
        """The value of a variable, an argument or an element; None if it is not set."""
        if name in ("0", "BASH_SOURCE"):
            return self.script if name == "0" else self.file
        if name == "#":
            return str(len(self.arguments))
        if name == "-":
            return "hB"  # the shell of a script, which is not interactive
        if name == "?" and self.status is not None:
            return "0" if self.status else self.code
        if name.isdigit():
            return dict(enumerate(self.arguments, 1)).get(int(name))
        if not name.isidentifier():
            return mark(f"${name}")
        values, by_name = self.all(name), self.variables.get(name)
        if isinstance(by_name, dict):
            return by_name.get(index)
        if not re.fullmatch(r"-?\d*", index):
            unknown = next((each for each in values if not is_known(each)), None)
            return self.refuse(f"{name}[{index}]") if unknown is None else unknown
        number = int(index or 0)
        return dict(enumerate(values)).get(number + len(values) if number < 0 else number)

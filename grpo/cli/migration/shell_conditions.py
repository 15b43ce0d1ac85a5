"""Conditions of a shell script: `[ ... ]`, `[[ ... ]]` and `((...))`.

One that only a program, a file or an unknown variable would decide is tried both ways: it matters only if what the
script sets then differs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

from grpo.cli.migration.shell_patterns import matches
from grpo.cli.migration.shell_state import CHOICE, Ended, Left, Undecided, Value, is_empty, is_known, mark
from grpo.cli.migration.shell_tree import Node
from grpo.cli.migration.shell_words import Words

EQUAL = {"=", "==", "!="}
ORDER = {"<": operator.lt, ">": operator.gt, "\\<": operator.lt, "\\>": operator.gt}
NUMBER = re.compile(r"\s*[-+]?\d+\s*")
NUMBERS = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
REPEATS = re.compile(r"[*+?{]")
MOST_REPEATS, LONGEST = 3, 200  # of an expression, and of the text that it is looked for in
OF_FILES = {"-e", "-f", "-r", "-s", "-a"}
Way = Callable[["Conditions"], None]
"""What a shell carries out if a condition goes one way."""


class Conditions(Words):
    """Decides conditions, and tries both ways where it cannot."""

    def run_all(self, statements: Sequence[Node]) -> None:
        raise NotImplementedError

    def holds(self, statements: Sequence[Node]) -> bool:
        """Return whether a condition holds. Raises Undecided if that depends on a program."""
        fails_at_once, self.fails_at_once = self.fails_at_once, False
        try:
            self.run_all(statements)
        finally:
            self.fails_at_once = fails_at_once
        if self.status is None:
            self.undecided(self.cause)
        return self.status

    # ---- both ways

    def try_ways(self, undecided: Undecided, *ways: Way) -> None:
        """Continues as every way would. Raises `undecided` if they start other commands or leave the script otherwise.

        A way that ends the script is not taken as long as another one is there. A variable that they set otherwise has
        a mark.
        """
        tried = [self._tried(way, undecided) for way in ways]
        self._take_commands([shell for shell, _ in tried], undecided)
        stay = [(shell, left) for shell, left in tried if not isinstance(left, Ended)]
        if len(stay) < len(tried) and stay:
            taken = "and what does not end the script is read"
            self.note(f"Line {undecided.line}: `{undecided.source}` cannot be decided, {taken}.")
        if not stay:
            self.ends[:] = tried[0][0].ends
            raise Ended
        if len({str(left) for _, left in stay}) > 1:
            raise undecided
        self._merge([shell for shell, _ in stay], undecided)
        if stay[0][1] is not None:
            raise stay[0][1]

    def _tried(self, way: Way, undecided: Undecided) -> tuple[Conditions, Ended | Left | None]:
        """A copy that has gone one way, and how it has left it."""
        shell = self.trial()
        try:
            way(shell)
        except (Ended, Left) as left:
            return shell, left
        except ValueError:
            if len(shell.commands) > len(self.commands):  # what comes after the command is of no interest
                return shell, Ended()
            raise undecided from None
        return shell, None

    def _take_commands(self, shells: list[Conditions], undecided: Undecided) -> None:
        """Takes the commands that the ways have started, which must be the same ones."""
        started = [shell.commands for shell in shells]
        if started == [self.commands] * len(shells):
            return
        if self.commands:  # the first one is known, and that is what is asked for
            self.notes.update({note: None for shell in shells for note in shell.notes})
            raise Ended
        first = next(each for each in started if each)
        others = [each for each in started if each[:1] != first[:1]]
        if any(others) or (others and not self.waits):  # a loop that waits begins again until it starts the command
            raise undecided
        self.commands += first
        raise Ended

    def _merge(self, shells: list[Conditions], undecided: Undecided) -> None:
        first, *others = shells
        same = (first.arguments, first.functions, first.fails_at_once, first.refuses_unset, first.output)
        for other in others:
            those = (other.arguments, other.functions, other.fails_at_once, other.refuses_unset, other.output)
            if those != same:
                raise undecided
        self.arguments, self.functions, self.fails_at_once, self.refuses_unset, output = same
        self.exported = set[str]().union(*(shell.exported for shell in shells))
        if self.output is not None and output is not None:
            self.output[:] = output
        self.misses_source = any(shell.misses_source for shell in shells)
        self.notes.update({note: None for shell in shells for note in shell.notes})
        names = dict.fromkeys(name for shell in shells for name in shell.variables)
        self.variables = {name: value for name in names if (value := self._merged(name, shells, undecided)) is not None}
        self.hidden = first.hidden
        self.status, self.cause = first.status, first.cause
        if any(shell.status != first.status for shell in shells):
            self.status, self.cause = None, undecided.cause

    def _merged(self, name: str, shells: list[Conditions], undecided: Undecided) -> Value | None:
        """The value that a variable has whichever way was gone; else a mark, or what the environment gives it."""
        values = [shell.variables.get(name) for shell in shells]
        if all(value == values[0] for value in values):
            return values[0]
        if name in self.given:
            self.note(f"{name}={self.given[name]} is read from the environment, since nothing decides it.")
            return self.given[name]
        self.choices[undecided.source] = undecided
        unknown = mark(undecided.source, name, CHOICE)
        return [unknown] if any(isinstance(value, list | dict) for value in values) else unknown

    # ---- tests

    def _testclause(self, node: Node) -> None:
        self.status, self.code = self._condition(node["X"]), "1"

    def _condition(self, node: Node) -> bool:
        """Return whether the condition inside of `[[ ... ]]` holds."""
        sign, first, second = node.get("Op", ""), node.get("X", node), node.get("Y", node)
        if node["Type"] == "ParenTest":
            return self._condition(first)
        if sign == "!":
            return not self._condition(first)
        if sign == "&&":
            return self._condition(first) and self._condition(second)
        if sign == "||":
            return self._condition(first) or self._condition(second)
        if node["Type"] not in ("Word", "UnaryTest", "BinaryTest"):
            self.refuse(node["Text"])
        left = self.settled(self.text(first))
        if node["Type"] != "BinaryTest":
            return self._checked(sign or "-n", left)
        if sign == "=~":
            return self._found(left, self.expression(second))
        right = self.text(second)
        if sign not in EQUAL:
            return self._compared(left, sign, right)
        if not is_known(left + right):
            self.undecided(f"{left} {sign} {right}")
        return matches(left, self.pattern(second)) != (sign == "!=")

    def _found(self, text: str, expression: str) -> bool:
        if not is_known(text + expression) or "[:" in expression or _may_hang(text, expression):
            self.undecided(f"{text} =~ {expression}")
        try:
            found = re.search(expression, text)
        except re.error:
            self.undecided(f"{text} =~ {expression}")
        self.variables["BASH_REMATCH"] = [found[0], *(group or "" for group in found.groups())] if found else []
        return found is not None

    def do_test(self, words: list[str]) -> None:
        words = words[:-1] if words[-1:] == ["]"] else words
        for sign, join in (("-o", any), ("-a", all)):
            if len(words) > 3 and sign in words:
                at = words.index(sign)
                self.status = join([self._tested(words[:at]), self._tested(words[at + 1 :])])
                return
        self.status = self._tested(words)

    def _tested(self, words: list[str]) -> bool:
        is_negated = len(words) > 1 and words[0] == "!"
        words = words[is_negated:]
        if len(words) > 3 and not {"-o", "-a"} & set(words):
            self.refuse()
        if len(words) > 3:
            self.do_test(words)
            return bool(self.status) != is_negated
        if len(words) == 3 and words[1] in NUMBERS and is_known("".join(words)) and not _are_numbers(*words):
            return is_negated  # bash complains, and calls it false
        if len(words) == 3:
            result = self._compared(*words)
        else:
            result = self._checked(words[0] if len(words) == 2 else "-n", "".join(words[-1:]))
        return result != is_negated

    def _checked(self, sign: str, text: str) -> bool:
        text = self.settled(text)
        if sign == "-v" and is_known(text) and not self.misses_source:
            return self.get(text) is not None
        if sign in OF_FILES and is_known(text) and self.path(text).is_file():
            self.note(f"The script asks for {text}, which is here.")
            return True
        empty = is_empty(text)
        if sign not in ("-n", "-z") or empty is None:
            self.undecided(f"{sign} {text}")
        return empty == (sign == "-z")

    def _compared(self, left: str, sign: str, right: str) -> bool:
        left, right = self.settled(left), self.settled(right)
        if sign in EQUAL and is_known(left + right):
            return (left == right) != (sign == "!=")
        if sign in ORDER and is_known(left + right):
            return ORDER[sign](left, right)
        if sign in NUMBERS and _are_numbers(left, sign, right):
            return NUMBERS[sign](int(left), int(right))
        self.undecided(f"{left} {sign} {right}")

    def _arithmcmd(self, node: Node) -> None:
        value = self.computed(node["X"], node["Text"])
        if not is_known(value):
            self.undecided(value)
        self.status, self.code = value != "0", "1"


def _may_hang(text: str, expression: str) -> bool:
    """Return whether a search with Python's `re` may take exponential time, as for `(a+)+b`."""
    repeats_group = re.search(r"\)[*+?{]", expression) is not None
    return repeats_group or len(text) > LONGEST or len(REPEATS.findall(expression)) > MOST_REPEATS


def _are_numbers(left: str, _: str, right: str) -> bool:
    return bool(NUMBER.fullmatch(left) and NUMBER.fullmatch(right))

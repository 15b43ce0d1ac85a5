"""Sums of a shell script, such as `$((n * 2))`, as bash works them out."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from grpo.cli.migration.shell_state import State, is_known, mark, names_in
from grpo.cli.migration.shell_tree import Node

NUMBER = re.compile(r"([-+]?)(?:(0[xX][\da-fA-F]+)|(0[0-7]+)|(\d+))")


class NotKnown(Exception):
    """A sum has a variable that is not known; its text is the variable."""


class Sums(State):
    """Works out arithmetic, and sets the variables that it assigns."""

    def text(self, word: Node | None) -> str:
        raise NotImplementedError

    def computed(self, node: Node, source: str) -> str:
        """The value of an arithmetic expression, or a mark where one of its variables is not known."""
        try:
            return str(self._value(node))
        except NotKnown as error:
            return mark(source, str(error))
        except ZeroDivisionError:
            raise ValueError(f"{source} divides by 0") from None

    def _value(self, node: Node) -> int:
        kind, sign = node["Type"], node.get("Op", "")
        if kind == "Word":
            return self._number(node)
        if kind == "ParenArithm":
            return self._value(node["X"])
        if kind == "UnaryArithm" and sign in ("++", "--"):
            return self._counted(node)
        if kind == "UnaryArithm":
            return SIGNS[sign](self._value(node["X"]))
        if kind != "BinaryArithm":
            self.refuse(node["Text"])
        if sign == "?":
            branch = node["Y"]["X"] if self._value(node["X"]) else node["Y"]["Y"]
            return self._value(branch)
        if sign in ("&&", "||"):
            left = bool(self._value(node["X"]))
            return int(left if left == (sign == "||") else bool(self._value(node["Y"])))
        if sign in OPERATORS:
            return _in_64_bits(OPERATORS[sign](self._value(node["X"]), self._value(node["Y"])))
        if sign[-1] != "=" or (sign != "=" and sign[:-1] not in OPERATORS):
            self.refuse(node["Text"])
        return self._assigned(node)

    def _assigned(self, node: Node) -> int:
        """The value of `a = b` or `a += b`, which is the variable's from then on."""
        name, sign = node["X"]["Text"], node["Op"][:-1]
        if not name.isidentifier():
            self.refuse(node["Text"])
        right = self._value(node["Y"])
        result = _in_64_bits(OPERATORS[sign](self._counter(node["X"]), right)) if sign else right
        self.assign(name, str(result))
        return result

    def _counted(self, node: Node) -> int:
        name = node["X"]["Text"]
        if not name.isidentifier():
            self.refuse(node["Text"])
        before = self._counter(node["X"])
        after = before + (1 if node["Op"] == "++" else -1)
        self.assign(name, str(after))
        return before if node.get("Post") else after

    def _counter(self, word: Node) -> int:
        """The value of a variable that is counted up. One that is not set counts from 0."""
        return 0 if self.get(word["Text"]) is None else self._number(word)

    def _number(self, word: Node) -> int:
        """The value of a number or a variable."""
        name = word["Text"]
        text = self.get(name) if name.isidentifier() else self.text(word)
        if text is None and name == self.assigned:
            return 0  # `n=$((n + 1))` begins at 0
        if text is None:
            raise NotKnown(name)
        if not is_known(text):
            raise NotKnown(names_in(text)[0])
        number = NUMBER.fullmatch(text.strip() or "0")
        if number is None:
            self.refuse(text)
        sign, hexadecimal, octal, decimal = number.groups()
        digits = int(hexadecimal or octal or decimal, 16 if hexadecimal else 8 if octal else 10)
        return -digits if sign == "-" else digits


def _quotient(left: int, right: int) -> int:
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _power(left: int, right: int) -> int:
    if right < 0:
        raise ValueError(f"{left}**{right} has an exponent below 0, which bash refuses")
    return pow(left, right, 1 << 64)


def _in_64_bits(value: int) -> int:
    """The value as bash has it, which starts again at -2^63 after 2^63 - 1."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


SIGNS: dict[str, Callable[[int], int]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "!": lambda value: int(not value),
}
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _quotient,
    "%": lambda left, right: left - _quotient(left, right) * right,
    "**": _power,
    "<<": lambda left, right: left << (right % 64),
    ">>": lambda left, right: left >> (right % 64),
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    ",": lambda _, right: right,
}

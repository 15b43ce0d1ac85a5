"""Words of a shell script with their variables, defaults and sums filled in, as bash expands them.

A text that nothing here can know has a mark in its place: the output of a program, a variable that is not set, a
secret. It travels with the text, so that an option or a condition that has it names the variable to give.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import escape
from typing import NoReturn

from grpo.cli.migration.shell_tree import Node

MARK = re.compile("\ue000([?0*])(\\w*)\ue001(.*?)\ue002", re.S)
UNKNOWN, UNSET, SECRET = "?0*"
FIELDS = re.compile("(?:\ue000.*?\ue002|[^ \t\n])+|[ \t\n]+", re.S)
BRACES = re.compile(r"(?<!\\)\{[^{}]*(,|\.\.)[^{}]*\}")
PARAMETER = {"Type", "Pos", "End", "Text", "Dollar", "Short", "Rbrace", "Param", "Index", "Exp", "Repl"}
Piece = tuple[str, str]
"""A text and how it is treated: `literal`, `quoted`, `split` at its blanks, or `break` between two words."""
Value = str | list[str]
"""A variable's: a text, or the elements of an array."""


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


def matches(text: str, pattern: str) -> bool:
    """Whether a pattern of the shell takes the whole text.

    >>> matches("npu0", "np*"), matches("*", "[*]")
    (True, True)
    """
    return fnmatchcase(text, pattern)


class Words:
    """Expands the words of a shell, which has the variables and carries out what words ask for."""

    file: str
    arguments: list[str]
    variables: dict[str, Value]

    def refuse(self, source: str = "") -> NoReturn:
        raise NotImplementedError

    def substitute(self, node: Node) -> str:
        raise NotImplementedError

    def missing(self, name: str, source: str, required: bool = False) -> str:
        raise NotImplementedError

    def fields(self, word: Node) -> list[str]:
        """The words that one word becomes: arrays and blanks of variables make several, or none."""
        literal = "".join(part["Value"] if part["Type"] == "Lit" else "x" for part in word["Parts"])
        if BRACES.search(literal):
            self.refuse(word["Text"])
        return list(self._fields(word["Parts"]))

    def _fields(self, parts: list[Node]) -> Iterator[str]:
        current: str | None = None
        for text, how in self.pieces(parts):
            for part in FIELDS.findall(text) if how == "split" else [text]:
                if how == "break" or (how == "split" and not part.strip(" \t\n")):
                    if current is not None:
                        yield current
                    current = None
                else:
                    current = (current or "") + part
        if current is not None:
            yield current

    def text(self, word: Node | None) -> str:
        """The word as one text, for assignments and conditions."""
        pieces = self.pieces(word["Parts"]) if word else ()
        return "".join(text for text, _ in pieces)

    def pattern(self, word: Node) -> str:
        """Return the word as a pattern. Quoted text is matched literally."""
        parts = []
        for text, how in self.pieces(word["Parts"]):
            if how != "quoted" and "[" in text:
                self.refuse(word["Text"])
            parts.append(escape(text) if how == "quoted" else text)
        return "".join(parts)

    def pieces(self, parts: list[Node], quoted: bool = False) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        for number, part in enumerate(parts):
            kind, text = part["Type"], part.get("Value", "")
            if kind == "Lit":
                yield from self._literal(text, quoted, first=number == 0)
            elif kind == "SglQuoted" and not part.get("Dollar"):
                yield text, "quoted"
            elif kind == "DblQuoted":
                yield "", "quoted"
                yield from self.pieces(part.get("Parts", []), quoted=True)
            elif kind == "ParamExp":
                yield from self._parameter(part, quoted)
            elif kind == "ArithmExp":
                yield self.computed(part["X"], part["Text"]), how
            elif kind == "CmdSubst":
                yield self.substitute(part), how
            else:
                self.refuse(part["Text"])

    def _literal(self, text: str, quoted: bool, first: bool) -> Iterator[Piece]:
        if first and not quoted and re.match(r"~(/|$)", text):
            yield str(self.variables.get("HOME", "~")), "quoted"
            text = text[1:]
        for escaped, plain in re.findall(r"\\(.)|([^\\]+|\\$)", text, re.S):
            if plain:
                yield plain, "quoted" if quoted else "literal"
            elif escaped != "\n":  # else the line goes on
                yield f"\\{escaped}" if quoted and escaped not in '$`"\\' else escaped, "quoted"

    # ---- variables

    def _parameter(self, node: Node, quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        name, operation = node["Param"]["Value"], node.get("Exp", {})
        index = node["Index"]["Text"] if "Index" in node else ""
        operator = operation.get("Op", "")
        several = name in ("@", "*") or index in ("@", "*")
        changes_letters = operator in LETTERS and "Word" not in operation
        is_read = not operator or (not several and (operator in DEFAULTS or changes_letters))
        if node.keys() - PARAMETER or not is_read or (several and "Repl" in node):
            self.refuse(node["Text"])
        if several:
            yield from self._several(self.all(name), how, joined=quoted and "*" in (name, index))
            return
        value = self.get(name, index)
        if operator in DEFAULTS:
            yield from self._defaulted(name, value, node, quoted)
        elif value is None:
            yield self.missing(name, node["Text"]), how
        elif not is_known(value) and (operator or "Repl" in node):
            yield mark(node["Text"], *names_in(value)[:1]), how
        elif "Repl" in node:
            yield self._replaced(value, node["Repl"]), how
        else:
            yield LETTERS.get(operator, str)(value), how

    def _replaced(self, value: str, replacement: Node) -> str:
        old, new = self.text(replacement["Orig"]), self.text(replacement.get("With"))
        is_pattern = old[:1] in ("", "#", "%") or self.pattern(replacement["Orig"]) != escape(old)
        if is_pattern or not is_known(old + new):
            self.refuse(replacement["Orig"]["Text"])
        return value.replace(old, new, -1 if replacement.get("All") else 1)

    @staticmethod
    def _several(values: list[str], how: str, joined: bool) -> Iterator[Piece]:
        if joined:
            yield " ".join(values), how
            return
        for number, value in enumerate(values):
            if number:
                yield " ", "break"
            yield value, how

    def all(self, name: str) -> list[str]:
        """The elements of an array, none if it is not set."""
        if name in ("@", "*"):
            return self.arguments
        value = self.variables.get(name, [])
        return [value] if isinstance(value, str) else value

    def get(self, name: str, index: str = "") -> str | None:
        """The value of a variable, an argument or an element; None if it is not set."""
        if name in ("0", "BASH_SOURCE"):
            return self.file
        if name.isdigit():
            return dict(enumerate(self.arguments, 1)).get(int(name))
        if not name.isidentifier():
            return mark(f"${name}")
        if not re.fullmatch(r"\d*", index):
            self.refuse(f"{name}[{index}]")
        return dict(enumerate(self.all(name))).get(int(index or 0))

    def _defaulted(self, name: str, value: str | None, node: Node, quoted: bool) -> Iterator[Piece]:
        how, operator, default = "quoted" if quoted else "split", node["Exp"]["Op"], node["Exp"].get("Word")
        absent = is_empty(value or "") if operator[0] == ":" else value is None
        if absent is None and value is not None:
            yield mark(node["Text"], *names_in(value)[:1]), how
        elif absent == (operator[-1] == "+"):
            yield ("" if operator[-1] == "+" else value or ""), how
        elif operator[-1] == "?":
            yield self.missing(name, node["Text"], required=True), how
        else:
            for text, each in self.pieces(default["Parts"] if default else [], quoted):
                yield text, how if each == "literal" else each

    # ---- sums

    def computed(self, node: Node, source: str) -> str:
        """The value of an arithmetic expression, or a mark where one of its variables is not known."""
        try:
            return str(self._value(node))
        except NotKnown as error:
            return mark(source, str(error))
        except ZeroDivisionError:
            raise ValueError(f"{source} divides by 0") from None

    def _value(self, node: Node) -> int:
        if node["Type"] == "Word":
            return self._number(node)
        if node["Type"] == "ParenArithm":
            return self._value(node["X"])
        if node["Type"] != "BinaryArithm" or node["Op"] not in OPERATORS:
            self.refuse(node["Text"])
        return int(OPERATORS[node["Op"]](self._value(node["X"]), self._value(node["Y"])))

    def _number(self, word: Node) -> int:
        """The value of a number or a variable."""
        name = word["Text"]
        text = self.get(name) if name.isidentifier() else self.text(word)
        if text is None:
            raise NotKnown(name)
        if not is_known(text):
            raise NotKnown(names_in(text)[0])
        if not re.fullmatch(r"[-+]?(0|[1-9]\d*)", text.strip()):
            self.refuse(text)
        return int(text)


class NotKnown(Exception):
    """A sum has a variable that is not known; its text is the variable."""


def _quotient(left: int, right: int) -> int:
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


DEFAULTS = (":-", "-", ":?", "?", ":+", "+")
LETTERS = {"^^": str.upper, ",,": str.lower}
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _quotient,
    "%": lambda left, right: left - _quotient(left, right) * right,
    "&&": lambda left, right: bool(left and right),
    "||": lambda left, right: bool(left or right),
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

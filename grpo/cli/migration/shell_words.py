"""Words of a shell script with their variables, defaults and sums filled in, as bash expands them.

A text that nothing here can know has a mark in its place: the output of a program, a variable that is not set, a
secret. It travels with the text, so that an option or a condition that has it names the variable to give.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Protocol

from grpo.cli.migration.shell_tree import Node, arithmetic

MARK = re.compile("\ue000([?0*])(\\w*)\ue001(.*?)\ue002", re.S)
UNKNOWN, UNSET, SECRET = "?0*"
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
Piece = tuple[str, str]
"""A text and how it is treated: `literal`, `quoted`, `split` at its blanks, or `break` between two words."""
Value = str | dict[str, str]
"""A variable's: a text, or the elements of an array by index."""


class Variables(Protocol):
    """What a word's expansion asks its shell for."""

    arguments: list[str]
    variables: dict[str, Value]
    assigned: str
    """The variable whose value is being expanded."""
    named: set[str]
    """Arrays whose indices are texts."""

    def assign(self, name: str, value: Value, index: Node | None = None) -> None: ...

    def substitute(self, node: Node) -> str: ...

    def special(self, name: str) -> str: ...

    def missing(self, name: str, source: str, required: bool = False) -> str: ...


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
    """Whether a text is empty, as far as that is known; a variable that is not set is."""
    text = MARK.sub(lambda found: found[0] if found[1] == UNKNOWN else found[2] * (found[1] == SECRET), text)
    return None if text and not MARK.sub("", text) else not text


def matches(text: str, pattern: str) -> bool:
    """Whether a pattern of the shell takes the whole text.

    >>> matches("npu0", "[n]p*"), matches("*", r"\\*")
    (True, True)
    """
    return re.compile(expression(pattern), re.S).fullmatch(text) is not None


def expression(pattern: str) -> str:
    """A pattern of the shell as a regular expression."""
    parts, at = [], 0
    while at < len(pattern):
        letter, at = pattern[at], at + 1
        group = re.compile(r"[!^]?\]?[^]]*\]").match(pattern, at) if letter == "[" else None
        if letter == "\\" and at < len(pattern):
            parts.append(re.escape(pattern[at]))
            at += 1
        elif group:
            inner = group[0][:-1].replace("\\", "\\\\")
            parts.append(f"[{re.sub('^!', '^', inner)}]")
            at = group.end()
        else:
            parts.append({"*": ".*", "?": "."}.get(letter, re.escape(letter)))
    return "".join(parts)


class Words:
    """Expands the words of one shell."""

    def __init__(self, shell: Variables):
        self.shell = shell

    def fields(self, word: Node) -> list[str]:
        """The words that one word becomes: braces, arrays and blanks of variables make several, or none."""
        return [field for parts in _braced(word["Parts"]) for field in self._fields(parts)]

    def _fields(self, parts: list[Node]) -> Iterator[str]:
        current: str | None = None
        separators = re.escape(self._separators()) or " "
        for text, how in self.pieces(parts):
            texts = [text]
            if how == "split":
                texts = re.findall(rf"(?:\ue000.*?\ue002|[^{separators}])+|[{separators}]+", text, re.S)
            elif how == "break":
                texts = [" "]
            for part in texts:
                if how in ("split", "break") and not part.strip(self._separators() + " "):
                    if current is not None:
                        yield current
                    current = None
                else:
                    current = (current or "") + part
        if current is not None:
            yield current

    def _separators(self) -> str:
        return str(self.shell.variables.get("IFS", " \t\n"))

    def text(self, word: Node | None) -> str:
        """The word as one text, for assignments and conditions."""
        pieces = self.pieces(word["Parts"]) if word else ()
        return "".join(" " if how == "break" else text for text, how in pieces)

    def pattern(self, word: Node | None) -> str:
        """The word as a pattern: what is quoted stands for itself."""
        pieces = self.pieces(word["Parts"]) if word else ()
        return "".join(re.sub(r"(\W)", r"\\\1", text) if how == "quoted" else text for text, how in pieces)

    def pieces(self, parts: list[Node], quoted: bool = False) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        for number, part in enumerate(parts):
            kind, text = part["Type"], part.get("Value", "")
            if kind == "Lit":
                yield from self._literal(text, quoted, first=number == 0)
            elif kind == "SglQuoted":
                yield self._escaped(text) if part.get("Dollar") else text, "quoted"
            elif kind == "DblQuoted":
                yield "", "quoted"
                yield from self.pieces(part.get("Parts", []), quoted=True)
            elif kind == "ParamExp":
                yield from self._parameter(part, quoted)
            elif kind == "ArithmExp":
                yield self.computed(part.get("X"), part["Text"]), how
            elif kind == "CmdSubst":
                yield self.shell.substitute(part), how
            else:
                yield part["Text"], "literal"

    def _literal(self, text: str, quoted: bool, first: bool) -> Iterator[Piece]:
        if first and not quoted and re.match(r"~(/|$)", text):
            yield str(self.shell.variables.get("HOME", "~")), "quoted"
            text = text[1:]
        for escaped, plain in re.findall(r"\\(.)|([^\\]+|\\$)", text, re.S):
            if plain:
                yield plain, "quoted" if quoted else "literal"
            elif escaped != "\n":  # else the line goes on
                yield f"\\{escaped}" if quoted and escaped not in '$`"\\' else escaped, "quoted"

    @staticmethod
    def _escaped(text: str) -> str:
        return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), text)

    # ---- variables

    def _parameter(self, node: Node, quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        name, index, operator = node["Param"]["Value"], node.get("Index"), node.get("Exp", {}).get("Op", "")
        several = name in ("@", "*") or _takes_all(index)
        if node.get("Length"):
            yield self._length(name, index, node["Text"]), how
            return
        if node.get("Excl"):
            raise ValueError(f"{node['Text']} cannot be read: a name in a variable is not supported")
        values = self._values(name, index)
        if several and (values or operator not in DEFAULTS) and operator not in ("+", ":+"):
            if slice_ := node.get("Slice"):
                values, node = self._sliced(values, name, slice_), {}
            for number, value in enumerate(values):
                if number:
                    joined = quoted and (name == "*" or (index or {}).get("Text") == "*")
                    yield (self._separators()[:1], "quoted") if joined else ("", "break")
                yield value if operator in DEFAULTS else self._changed(value, node), how
            return
        yield from self._defaulted(name, values, node, quoted)

    def _array(self, name: str) -> dict[str, str]:
        value = self.shell.variables.get(name, {})
        return value if isinstance(value, dict) else {"0": value}

    def _values(self, name: str, index: Node | None) -> list[str]:
        """All values that a name means, and none where it is not set."""
        if name in ("@", "*"):
            return self.shell.arguments
        if _takes_all(index):
            return list(self._array(name).values())
        value = self.get(name, index)
        return [] if value is None else [value]

    def get(self, name: str, index: Node | None) -> str | None:
        if name.isdigit() and name != "0":
            return dict(enumerate(self.shell.arguments, 1)).get(int(name))
        if not name.isidentifier():
            return self.shell.special(name)
        array = self._array(name)
        key = "0" if index is None else self.index(name, index)
        if key.startswith("-") and name not in self.shell.named:  # counted from the end
            return dict(zip(range(-len(array), 0), array.values(), strict=True)).get(int(key))
        return array.get(key)

    def index(self, name: str, index: Node) -> str:
        """The index of an element: a sum, or the text itself where the array has names."""
        if name in self.shell.named:
            return self.text(index) if index["Type"] == "Word" else index["Text"]
        return self.computed(index, index["Text"])

    def _length(self, name: str, index: Node | None, source: str) -> str:
        values = self._values(name, index)
        if name in ("@", "*") or _takes_all(index):
            return str(len(values))
        return str(len("".join(values))) if is_known("".join(values)) else mark(source, *names_in("".join(values))[:1])

    def _defaulted(self, name: str, values: list[str], node: Node, quoted: bool) -> Iterator[Piece]:
        how, source, operation = "quoted" if quoted else "split", node["Text"], node.get("Exp", {})
        value, operator, default = " ".join(values), operation.get("Op", ""), operation.get("Word")
        if operator not in DEFAULTS:
            yield (self._changed(value, node) if values else self.shell.missing(name, source)), how
            return
        absent = is_empty(value) if values and operator[0] == ":" else not values
        if operator[-1] == "+" and absent is not None:
            absent = not absent
        if absent is None:
            yield mark(source, *names_in(value)[:1]), how
        elif not absent:
            yield ("" if operator[-1] == "+" else value), how
        elif operator[-1] == "?":
            yield self.shell.missing(name, source, required=True), how
        elif operator[-1] == "=":
            self.shell.assign(name, self.text(default), node.get("Index"))
            yield "".join(self._values(name, node.get("Index"))), how
        else:
            for text, each in self.pieces(default["Parts"] if default else [], quoted):
                yield text, how if each == "literal" else each

    def _sliced(self, values: list[str], name: str, bounds: Node) -> list[str]:
        """Those of several values that `${A[@]:first:count}` takes."""
        first, count = self._bounds(bounds) or (0, None)
        values = [self.shell.special("0"), *values] if name in ("@", "*") else values
        return values[first:] if count is None else values[first:][:count]

    def _bounds(self, bounds: Node) -> tuple[int, int | None] | None:
        numbers = [self.computed(bounds[name], "") for name in ("Offset", "Length") if name in bounds]
        if not all(map(is_known, numbers)):
            return None
        return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None

    def _changed(self, value: str, node: Node) -> str:
        """The value after `#`, `%`, `/`, `^`, `,` or `:first:count`."""
        operation, replacement, bounds = node.get("Exp"), node.get("Repl"), node.get("Slice")
        if not (operation or replacement or bounds):
            return value
        if not is_known(value):
            return mark(node["Text"], *names_in(value)[:1])
        if replacement:
            return self._replaced(value, replacement)
        if bounds:
            return self._part(value, bounds, node["Text"])
        operator, word = (operation or {})["Op"], (operation or {}).get("Word")
        if operator in ("#", "##", "%", "%%"):
            return self._trimmed(value, operator, word)
        if word or operator not in LETTERS:
            raise ValueError(f"{node['Text']} cannot be read: {operator} is not supported")
        return LETTERS[operator](value)

    def _part(self, value: str, bounds: Node, source: str) -> str:
        numbers = self._bounds(bounds)
        if numbers is None:
            return mark(source)
        first, count = numbers
        if count is None or count < 0:
            return value[first:count]
        return value[first:][:count]

    def _trimmed(self, value: str, operator: str, word: Node | None) -> str:
        at_end, longest = operator[0] == "%", len(operator) == 2
        pattern = re.compile(expression(self.pattern(word)), re.S)
        cuts = range(len(value) + 1)
        for cut in cuts if at_end == longest else reversed(cuts):
            removed, kept = (value[cut:], value[:cut]) if at_end else (value[:cut], value[cut:])
            if pattern.fullmatch(removed):
                return kept
        return value

    def _replaced(self, value: str, replacement: Node) -> str:
        pattern, new = self.pattern(replacement.get("Orig")), self.text(replacement.get("With"))
        if pattern[:1] == "#":
            pattern = f"^(?:{expression(pattern[1:])})"
        elif pattern[:1] == "%":
            pattern = f"(?:{expression(pattern[1:])})$"
        else:
            pattern = expression(pattern)
        return re.compile(pattern, re.S).sub(lambda _: new, value, count=0 if replacement.get("All") else 1)

    # ---- sums

    def computed(self, node: Node | None, source: str) -> str:
        """The value of an arithmetic expression, or a mark where one of its variables is not known."""
        try:
            return str(self.value(node))
        except NotKnown as error:
            return mark(source, str(error))
        except ZeroDivisionError:
            raise ValueError(f"{source} divides by 0") from None

    def value(self, node: Node | None) -> int:
        if node is None:
            return 0
        kind, sign = node["Type"], node.get("Op", "")
        if kind == "Word":
            return self._number(node)
        if kind == "ParenArithm":
            return self.value(node["X"])
        if kind == "UnaryArithm" and sign in ("++", "--"):
            before = self._number(node["X"], counts=True)
            after = before + (1 if sign == "++" else -1)
            self._store(node["X"], after)
            return before if node.get("Post") else after
        if kind == "UnaryArithm":
            value = self.value(node["X"])
            return {"-": -value, "+": value, "!": int(not value), "~": ~value}[sign]
        if sign == "?":
            return self.value(node["Y"]["X"] if self.value(node["X"]) else node["Y"]["Y"])
        if sign[-1] == "=" and sign not in ("==", "!=", "<=", ">="):
            value = self.value(node["Y"])
            if sign != "=":
                value = OPERATORS[sign[:-1]](self._number(node["X"], counts=True), value)
            self._store(node["X"], value)
            return value
        return int(OPERATORS[sign](self.value(node["X"]), self.value(node["Y"])))

    def _number(self, word: Node, counts: bool = False) -> int:
        """The value of a number or a variable. One that is not set counts from 0, and has no value elsewhere."""
        name, index = _variable(word)
        if name is None:
            text = self.text(word)
        elif (value := self.get(name, index)) is not None:
            text = "0" if value.strip() == name else value
        elif counts or name == self.shell.assigned:
            return 0
        else:
            raise NotKnown(name)
        if not is_known(text):
            raise NotKnown(names_in(text)[0])
        return self.evaluated(text.strip())

    def evaluated(self, text: str) -> int:
        """The value of a text that a variable holds: `12`, `0x1f`, or a sum."""
        if re.fullmatch(r"[-+]?\d+|0[xX][\da-fA-F]+", text):
            return int(text, 16 if text[:2] in ("0x", "0X") else 8 if re.match(r"0\d", text) else 10)
        return self.value(arithmetic(text))

    def _store(self, word: Node, value: int) -> None:
        name, index = _variable(word)
        if name is None:
            raise ValueError(f"{word['Text']} is no variable, and cannot be set")
        self.shell.assign(name, str(value), index)


class NotKnown(Exception):
    """A sum has a variable that is not known; its text is the variable."""


def _quotient(left: int, right: int) -> int:
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


DEFAULTS = (":-", "-", ":=", "=", ":?", "?", ":+", "+")
LETTERS = {"^^": str.upper, ",,": str.lower}
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _quotient,
    "%": lambda left, right: left - _quotient(left, right) * right,
    "**": lambda left, right: left ** min(right, 64),
    "<<": lambda left, right: left << min(right, 64),
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "&&": lambda left, right: bool(left and right),
    "||": lambda left, right: bool(left or right),
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    ",": lambda left, right: right,
}


def _takes_all(index: Node | None) -> bool:
    return index is not None and index["Text"] in ("@", "*")


def _variable(word: Node) -> tuple[str | None, Node | None]:
    """The variable of a sum that stands without `$`, and its index."""
    if word["Type"] == "Word" and len(word["Parts"]) == 1:
        [part] = word["Parts"]
        if part["Type"] == "Lit" and part["Value"].isidentifier():
            return part["Value"], None
        if part["Type"] == "ParamExp" and not part["Text"].startswith("$"):
            return part["Param"]["Value"], part["Index"]
    return None, None


# ---- braces ----------------------------------------------------------------------------------------------------------


def _braced(parts: list[Node]) -> list[list[Node]]:
    """The words that `{a,b}` and `{1..3}` make of one; a variable within braces is not looked at."""
    found: list[list[Node]] = [[]]
    for part in parts:
        texts = braces(part["Value"]) if part["Type"] == "Lit" else [None]
        found = [[*before, part if text is None else part | {"Value": text}] for before in found for text in texts]
    return found


def braces(text: str) -> list[str]:
    """
    >>> braces("x{a,b{1..2}}y"), braces("{b}")
    (['xay', 'xb1y', 'xb2y'], ['{b}'])
    """
    for opening in re.finditer(r"(?<!\\){", text):
        parts, end = _alternatives(text, opening.end())
        if parts:
            rest = braces(text[end:])
            middle = [each for part in parts for each in braces(part)]
            return [text[: opening.start()] + each + after for each in middle for after in rest]
    return [text]


def _alternatives(text: str, start: int) -> tuple[list[str], int]:
    """The texts between the commas of a brace that ends, and its end."""
    parts, depth = [""], 0
    for at in range(start, len(text)):
        letter = text[at]
        if letter == "}" and not depth:
            numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", parts[0])
            if numbers and len(parts) == 1:
                first, last = int(numbers[1]), int(numbers[2])
                step = 1 if last >= first else -1
                parts = [str(number) for number in range(first, last + step, step)][:1000]
            return parts if len(parts) > 1 or numbers else [], at + 1
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [], 0

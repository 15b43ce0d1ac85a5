"""Words of a shell script with their variables, defaults and sums filled in, as bash expands them.

A text that nothing here can know has a mark in its place: the output of a program, a variable that is not set, a
secret. It travels with the text, so that an option or a condition that has it names the variable to give.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from grpo.cli.migration.shell_syntax import end_of

MARK = re.compile("\ue000([?0*])(\\w*)\ue001(.*?)\ue002", re.S)
UNKNOWN, UNSET, SECRET = "?0*"
PARAMETER = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!-]")
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

    def assign(self, name: str, value: Value, index: str | None = None) -> None: ...

    def substitute(self, source: str) -> str: ...

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

    def fields(self, raw: str) -> list[str]:
        """The words that one word becomes: braces, arrays and blanks of variables make several, or none."""
        return [field for each in braces(raw) for field in self._fields(each)]

    def _fields(self, raw: str) -> Iterator[str]:
        current: str | None = None
        separators = re.escape(self._separators()) or " "
        for text, how in self.pieces(raw):
            parts = [text]
            if how == "split":
                parts = re.findall(rf"(?:\ue000.*?\ue002|[^{separators}])+|[{separators}]+", text, re.S)
            elif how == "break":
                parts = [" "]
            for part in parts:
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

    def text(self, raw: str) -> str:
        """The word as one text, for assignments and conditions."""
        return "".join(" " if how == "break" else text for text, how in self.pieces(raw))

    def pattern(self, raw: str) -> str:
        """The word as a pattern: what is quoted stands for itself."""
        return "".join(re.sub(r"(\W)", r"\\\1", text) if how == "quoted" else text for text, how in self.pieces(raw))

    def pieces(self, raw: str, quoted: bool = False) -> Iterator[Piece]:
        at, plain = 0, "quoted" if quoted else "literal"
        if not quoted and re.match(r"~(/|$)", raw):
            yield str(self.shell.variables.get("HOME", "~")), "quoted"
            at = 1
        while at < len(raw):
            first, end = raw[at], end_of(raw, at, quoted)
            if first == "\\":
                yield from self._escaped(raw[at + 1 : end], quoted)
            elif first == "'" and not quoted:
                yield raw[at + 1 : end - 1], "quoted"
            elif first == '"':
                yield from self.pieces(raw[at + 1 : end - 1], quoted=True)
                if end == at + 2:
                    yield "", "quoted"
            elif first == "`":
                inner = re.sub(r"\\([`$\\])", r"\1", raw[at + 1 : end - 1])
                yield self.shell.substitute(inner), "quoted" if quoted else "split"
            elif first == "$":
                name = PARAMETER.match(raw, at + 1)
                if name and end == at + 1:
                    end = name.end() if name[0].isidentifier() else at + 2
                yield from self._expansion(raw[at:end], quoted)
            else:
                yield first, plain
            at = end

    @staticmethod
    def _escaped(letter: str, quoted: bool) -> Iterator[Piece]:
        if letter != "\n":  # else the line goes on
            yield f"\\{letter}" if quoted and letter not in '$`"\\' else letter, "quoted"

    def _expansion(self, raw: str, quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        if raw == "$":
            yield raw, "quoted" if quoted else "literal"
        elif raw.startswith("$'"):
            yield re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), raw[2:-1]), "quoted"
        elif raw.startswith("$((") and raw.endswith("))"):
            yield self.computed(raw[3:-2], raw), how
        elif raw.startswith("$("):
            yield self.shell.substitute(raw[2:-1]), how
        elif raw.startswith("${"):
            yield from self._parameter(raw[2:-1], raw, quoted)
        else:
            yield from self._parameter(raw[1:], raw, quoted)

    # ---- variables

    def _parameter(self, content: str, raw: str, quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        if count := re.fullmatch(r"#(\w+|[@*])(\[(.*)\])?", content, re.S):
            yield self._length(count[1], count[3], raw), how
            return
        indirect = content.startswith("!") and len(content) > 1
        name, index, rest = self._parts(content[indirect:], raw)
        if indirect and index in ("@", "*"):
            values = list(self._array(name))
        elif indirect:
            name = self.shell.special(name) if name in "@*#?$!-" else str(self.get(name, index) or "")
            name, index, rest = self._parts(name + rest, raw)
            values = self._values(name, index)
        else:
            values = self._values(name, index)
        several = name in ("@", "*") or index in ("@", "*")
        if several and (values or not re.match(r":?[-=?]", rest)) and not re.match(r":?\+", rest):
            rest = "" if re.match(r":?[-=?]", rest) else rest
            if bounds := self._bounds(rest):
                values, rest = self._sliced(values, name, *bounds), ""
            for number, value in enumerate(self._changed(value, rest, raw) for value in values):
                if number:
                    joined = quoted and "*" in (name, index)
                    yield (self._separators()[:1], "quoted") if joined else ("", "break")
                yield value, how
            return
        yield from self._defaulted(name, index, values, rest, raw, quoted)

    def _parts(self, content: str, raw: str) -> tuple[str, str | None, str]:
        """Name, index and operator of what stands in `${...}`."""
        if not (match := PARAMETER.match(content)):
            raise ValueError(f"{raw} cannot be read: it begins with no variable")
        at = match.end()
        if not content.startswith("[", at):
            return match[0], None, content[at:]
        end = at + 1
        while content[end : end + 1] not in ("]", ""):
            end = end_of(content, end)
        return match[0], content[at + 1 : end], content[end + 1 :]

    def _array(self, name: str) -> dict[str, str]:
        value = self.shell.variables.get(name, {})
        return value if isinstance(value, dict) else {"0": value}

    def _values(self, name: str, index: str | None) -> list[str]:
        """All values that a name means, and none where it is not set."""
        if name in ("@", "*"):
            return self.shell.arguments
        if index in ("@", "*"):
            return list(self._array(name).values())
        value = self.get(name, index)
        return [] if value is None else [value]

    def get(self, name: str, index: str | None) -> str | None:
        if name.isdigit() and name != "0":
            return dict(enumerate(self.shell.arguments, 1)).get(int(name))
        if not name.isidentifier():
            return self.shell.special(name)
        array = self._array(name)
        key = "0" if index is None else self.index(name, index)
        if key.startswith("-") and name not in self.shell.named:  # counted from the end
            return dict(zip(range(-len(array), 0), array.values(), strict=True)).get(int(key))
        return array.get(key)

    def index(self, name: str, raw: str) -> str:
        """The index of an element: a sum, or the text itself where the array has names."""
        text = self.text(raw)
        return text if name in self.shell.named or text.isdigit() else self.computed(text, raw)

    def _length(self, name: str, index: str | None, raw: str) -> str:
        values = self._values(name, index)
        if name in ("@", "*") or index in ("@", "*"):
            return str(len(values))
        return str(len("".join(values))) if is_known("".join(values)) else mark(raw, *names_in("".join(values))[:1])

    def _defaulted(
        self, name: str, index: str | None, values: list[str], rest: str, raw: str, quoted: bool
    ) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        value, operator = " ".join(values), re.match(r"(:?)([-+=?])", rest)
        if not operator:
            yield (self._changed(value, rest, raw) if values else self.shell.missing(name, raw)), how
            return
        absent = is_empty(value) if values and operator[1] else not values
        default = rest[operator.end() :]
        if operator[2] == "+" and absent is not None:
            absent = not absent
        if absent is None:
            yield mark(raw, *names_in(value)[:1]), how
        elif not absent:
            yield ("" if operator[2] == "+" else value), how
        elif operator[2] == "?":
            yield self.shell.missing(name, raw, required=True), how
        elif operator[2] == "=":
            self.shell.assign(name, self.text(default), index)
            yield "".join(self._values(name, index)), how
        else:
            for text, each in self.pieces(default, quoted):
                yield text, how if each == "literal" else each

    def _sliced(self, values: list[str], name: str, first: int, count: int | None) -> list[str]:
        """Those of several values that `${A[@]:first:count}` takes."""
        values = [self.shell.special("0"), *values] if name in ("@", "*") else values
        return values[first:] if count is None else values[first:][:count]

    def _bounds(self, rest: str) -> tuple[int, int | None] | None:
        if not (match := re.fullmatch(r":([^-+=?].*?)(?::(.*))?", rest, re.S)):
            return None
        numbers = [self.computed(part, part) for part in match.groups() if part]
        if not all(map(is_known, numbers)):
            return None
        return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None

    def _changed(self, value: str, rest: str, raw: str) -> str:
        """The value after `#`, `%`, `/`, `^`, `,` or `:first:count`."""
        if not rest:
            return value
        if not is_known(value):
            return mark(raw, *names_in(value)[:1])
        if bounds := self._bounds(rest):
            first, count = bounds
            end = (
                None if count is None else count if count < 0 else (first if first >= 0 else len(value) + first) + count
            )
            return value[first:end]
        if rest.startswith(("#", "%")):
            return self._trimmed(value, rest)
        if rest.startswith("/"):
            return self._replaced(value, rest)
        change = {"^^": str.upper, ",,": str.lower}.get(rest)
        if rest in ("^", ","):
            first_letter = value[:1].upper() if rest == "^" else value[:1].lower()
            return first_letter + value[1:]
        if change is None and not rest.startswith(":"):
            raise ValueError(f"{raw} cannot be read: {rest} is not supported")
        return change(value) if change else mark(raw)

    def _trimmed(self, value: str, rest: str) -> str:
        at_end, longest = rest[0] == "%", rest[1:2] == rest[0]
        pattern = re.compile(expression(self.pattern(rest[1 + longest :])), re.S)
        cuts = range(len(value) + 1)
        for cut in cuts if at_end == longest else reversed(cuts):
            removed, kept = (value[cut:], value[:cut]) if at_end else (value[:cut], value[cut:])
            if pattern.fullmatch(removed):
                return kept
        return value

    def _replaced(self, value: str, rest: str) -> str:
        at = 1 + (rest[1:2] in tuple("/#%") and len(rest) > 1)
        how, start = rest[1:at], at
        while at < len(rest) and rest[at] != "/":
            at = end_of(rest, at)
        pattern, new = expression(self.pattern(rest[start:at])), self.text(rest[at + 1 :])
        pattern = f"^(?:{pattern})" if how == "#" else f"(?:{pattern})$" if how == "%" else pattern
        return re.compile(pattern, re.S).sub(lambda _: new, value, count=0 if how == "/" else 1)

    # ---- sums

    def computed(self, terms: str, raw: str) -> str:
        """The value of an arithmetic expression, or a mark where one of its variables is not known."""
        text = self.text(f'"{terms}"') if '"' not in terms else self.text(terms)
        if not is_known(text):
            return mark(raw, *names_in(text)[:1])
        try:
            return str(Sum(text, self).value())
        except NotKnown as error:
            return mark(raw, str(error))


class NotKnown(Exception):
    """A sum has a variable that is not known; its text is the variable."""


LEVELS: tuple[tuple[str, ...], ...] = (  # what binds the least, first
    ("||",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", "<=", ">", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/", "%"),
)
TOKEN = re.compile(
    r"\d+#\w+|0[xX][\da-fA-F]+|\d+|[A-Za-z_]\w*(?:\[[^]]*\])?|<<=|>>=|\*\*|\+\+|--|[-+*/%&|^]=|<<|>>|<=|>=|==|!="
    r"|&&|\|\||\S"
)


class Sum:
    """An arithmetic expression of whole numbers.

    >>> Sum("2 * (3 + 4) - 7 / 2 % 2", Words(None)).value()
    13
    """

    def __init__(self, text: str, words: Words):
        self.text, self.words = text, words
        self.tokens, self.at = TOKEN.findall(text), 0

    def value(self) -> int:
        value = 0 if not self.tokens else self.assigned()
        while self.takes(","):
            value = self.assigned()
        if self.at < len(self.tokens):
            self.refuse()
        return value

    def refuse(self) -> None:
        raise ValueError(f"$(({self.text})) cannot be computed: see {''.join(self.tokens[self.at :]) or 'its end'!r}")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def takes(self, *tokens: str) -> str:
        token = self.peek()
        if token not in tokens:
            return ""
        self.at += 1
        return token

    def assigned(self) -> int:
        name, operator = self.peek(), self.peek(1)
        if not name[:1].isidentifier() or operator not in ("=", "+=", "-=", "*=", "/=", "%="):
            return self.chosen()
        self.at += 2
        value = self.assigned()
        value = value if operator == "=" else self.apply(operator[0], self.number(name, counts=True), value)
        self.store(name, value)
        return value

    def chosen(self) -> int:
        condition = self.level(0)
        if not self.takes("?"):
            return condition
        first = self.assigned()
        if not self.takes(":"):
            self.refuse()
        second = self.chosen()
        return first if condition else second

    def level(self, number: int) -> int:
        if number == len(LEVELS):
            return self.power()
        left = self.level(number + 1)
        while operator := self.takes(*LEVELS[number]):
            left = self.apply(operator, left, self.level(number + 1))
        return left

    def power(self) -> int:
        base = self.single()
        return base ** min(self.power(), 64) if self.takes("**") else base

    def single(self) -> int:
        if sign := self.takes("-", "+", "!", "~"):
            value = self.single()
            return {"-": -value, "+": value, "!": int(not value), "~": ~value}[sign]
        if step := self.takes("++", "--"):
            name = self.peek()
            self.at += 1
            value = self.number(name, counts=True) + (1 if step == "++" else -1)
            self.store(name, value)
            return value
        if self.takes("("):
            value = self.assigned()
            if not self.takes(")"):
                self.refuse()
            return value
        token = self.peek()
        if not re.match(r"\w", token):
            self.refuse()
        self.at += 1
        value = self.number(token, counts=self.peek() in ("++", "--"))
        if step := self.takes("++", "--"):
            self.store(token, value + (1 if step == "++" else -1))
        return value

    def number(self, token: str, counts: bool = False) -> int:
        """The value of a number or a variable. One that is not set counts from 0, and has no value elsewhere."""
        if "#" in token:
            base, digits = token.split("#")
            return int(digits, int(base))
        if token[0].isdigit():
            return int(token, 16 if token[:2] in ("0x", "0X") else 8 if token[0] == "0" else 10)
        name, _, index = token.partition("[")
        value = self.words.get(name, index[:-1] or None)
        if value is None and (counts or name == self.words.shell.assigned):
            return 0
        if value is None:
            raise NotKnown(name)
        if not is_known(value):
            raise NotKnown(names_in(value)[0])
        return Sum(value, self.words).value() if value.strip() != token else 0

    def store(self, token: str, value: int) -> None:
        name, _, index = token.partition("[")
        self.words.shell.assign(name, str(value), index[:-1] or None)

    def apply(self, operator: str, left: int, right: int) -> int:
        if operator in "/%":
            if not right:
                raise ValueError(f"$(({self.text})) divides by 0")
            quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
            return quotient if operator == "/" else left - quotient * right
        results = {
            "+": lambda: left + right,
            "-": lambda: left - right,
            "*": lambda: left * right,
            "<<": lambda: left << min(right, 64),
            ">>": lambda: left >> right,
            "&": lambda: left & right,
            "|": lambda: left | right,
            "^": lambda: left ^ right,
            "&&": lambda: int(bool(left and right)),
            "||": lambda: int(bool(left or right)),
            "==": lambda: int(left == right),
            "!=": lambda: int(left != right),
            "<": lambda: int(left < right),
            "<=": lambda: int(left <= right),
            ">": lambda: int(left > right),
            ">=": lambda: int(left >= right),
        }
        return results[operator]()


# ---- braces ----------------------------------------------------------------------------------------------------------


def braces(raw: str) -> list[str]:
    """The words that `{a,b}` and `{1..3}` make of one.

    >>> braces("x{a,b{1..2}}y"), braces("${A}{b}")
    (['xay', 'xb1y', 'xb2y'], ['${A}{b}'])
    """
    at = 0
    while at < len(raw):
        parts, end = _alternatives(raw, at) if raw[at] == "{" else ([], 0)
        if parts:
            rest = braces(raw[end:])
            middle = [each for part in parts for each in braces(part)]
            return [raw[:at] + each + after for each in middle for after in rest]
        at = end_of(raw, at)
    return [raw]


def _alternatives(raw: str, start: int) -> tuple[list[str], int]:
    parts, depth, at, begin = [], 0, start + 1, start + 1
    while at < len(raw):
        if raw[at] == "}" and not depth:
            break
        depth += {"{": 1, "}": -1}.get(raw[at], 0)
        if raw[at] == "," and not depth:
            parts.append(raw[begin:at])
            begin = at + 1
        at = end_of(raw, at)
    else:
        return [], 0
    if parts:
        return [*parts, raw[begin:at]], at + 1
    if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", raw[begin:at]):
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        return [str(number) for number in range(first, last + step, step)][:1000], at + 1
    return [], 0

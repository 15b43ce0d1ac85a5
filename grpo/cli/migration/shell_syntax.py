"""The commands of a shell script as a tree, of the part of bash that launch scripts are written in. Words stay as
they are written; shell_words.py expands them when their command is reached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NAME = re.compile(r"[A-Za-z_]\w*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[([^]]*)\])?(\+?)=", re.S)
REDIRECT = re.compile(r"(\d*)(<<<|<<-?|&>>|&>|>&|<&|>>|>\||<>|<|>)")
ENDS = {"then", "else", "elif", "fi", "do", "done", "esac", "}", ")", ";;", ";&", ";;&"}
META = " \t\n;&|()<>"


@dataclass(frozen=True)
class Assignment:
    name: str
    index: str | None
    """Of an element of an array, as it is written."""
    appends: bool
    value: str | list[str]
    """A word, or the words of an array."""


@dataclass
class Node:
    line: int
    redirects: list[tuple[str, str, str]] = field(default_factory=list, kw_only=True)
    """File number, operator and target, such as `("2", ">", "/dev/null")`."""


@dataclass
class Command(Node):
    words: list[str | Assignment] = field(default_factory=list)
    """Assignments stand among the words of `declare` and `export`."""
    assignments: list[Assignment] = field(default_factory=list)


@dataclass
class Sequence(Node):
    parts: list[Node]


@dataclass
class Pipeline(Node):
    parts: list[Node]


@dataclass
class Not(Node):
    part: Node


@dataclass
class Both(Node):
    """`first && second`, or `first || second`."""

    operator: str
    first: Node
    second: Node


@dataclass
class If(Node):
    branches: list[tuple[Node, Node]]
    otherwise: Node | None


@dataclass
class Case(Node):
    word: str
    branches: list[tuple[list[str], Node, str]]
    """Patterns, commands, and the `;;` that ends them."""


@dataclass
class For(Node):
    name: str
    words: list[str]
    body: Node


@dataclass
class Counting(Node):
    """`for ((first; condition; step))`."""

    first: str
    condition: str
    step: str
    body: Node


@dataclass
class While(Node):
    condition: Node
    body: Node
    until: bool


@dataclass
class Subshell(Node):
    body: Node


@dataclass
class Function(Node):
    name: str
    body: Node


@dataclass
class Test(Node):
    """`[[ ... ]]`."""

    words: list[str]


@dataclass
class Arithmetic(Node):
    """`(( ... ))`."""

    text: str


def parse(text: str) -> Sequence:
    """The tree of a script. Raises ValueError with the line of what cannot be read."""
    return Parser(text).script()


def end_of(text: str, start: int, quoted: bool = False) -> int:
    """Where the character, the quoted text or the expansion that begins at `start` ends.

    >>> end_of('"a b" c', 0), end_of("${A:-${B}}/x", 0), end_of("abc", 0)
    (5, 10, 1)
    """
    first, pair = text[start], text[start : start + 2]
    if first == "\\":
        return start + 2
    if (first == "'" or pair == "$'") and not quoted:
        at = start + len("$'" if first == "$" else "'")
        while text[at] != "'":
            at += 2 if text[at] == "\\" and first == "$" else 1
        return at + 1
    if first in '"`':
        return _closing(text, start + 1, first, quoted=True)
    if pair == "${":
        return _closing(text, start + 2, "}", quoted)
    if pair == "$(" and (end := end_of_arithmetic(text, start)):
        return end
    if pair == "$(" or (pair in ("<(", ">(") and not quoted):
        inner = Parser(text, start + 2)
        inner.sequence()
        return inner.expect(")")
    return start + 1


def end_of_arithmetic(text: str, start: int) -> int | None:
    """Where `$((...))` ends; None if `$(` begins the commands of a substitution."""
    if not text.startswith("$((", start):
        return None
    depth, at = 0, start + 1
    while at < len(text):
        if text[at] in "()":
            depth += 1 if text[at] == "(" else -1
            if depth == 1 and text[at] == ")":
                return at + 2 if text.startswith("))", at) else None
        at = end_of(text, at) if text[at] not in "()" else at + 1
    return None


def _closing(text: str, at: int, mark: str, quoted: bool) -> int:
    while text[at] != mark:
        at = end_of(text, at, quoted)
    return at + 1


class Parser:
    """Reads commands from a position of a text on."""

    def __init__(self, text: str, at: int = 0):
        self.text, self.at = text, at
        self.documents: list[tuple[str, bool]] = []  # the ends of here-documents that begin after this line

    def script(self) -> Sequence:
        try:
            sequence = self.sequence()
            if self.at < len(self.text):
                self.refuse(f"{self.peek()!r} ends nothing")
        except IndexError:  # read past the end
            self.at = min(self.at, len(self.text))
            self.refuse("a quote or a bracket has no end")
        return sequence

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def refuse(self, why: str) -> None:
        raise ValueError(f"line {self.line} of the shell text cannot be read: {why}")

    # ---- characters and words

    def blanks(self) -> None:
        """Skips blanks, continued lines and a comment."""
        while self.at < len(self.text):
            if self.text[self.at] in " \t\r":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] == "#":
                self.at = (self.text + "\n").index("\n", self.at)
            else:
                return

    def lines(self) -> None:
        """Skips empty lines, and the here-documents that begin after this one."""
        self.blanks()
        while self.text.startswith("\n", self.at):
            self.at += 1
            for end, tabs in self.documents:
                self._skip_document(end, tabs)
            self.documents.clear()
            self.blanks()

    def _skip_document(self, end: str, tabs: bool) -> None:
        while self.at < len(self.text):
            after = (self.text + "\n").index("\n", self.at)
            line = self.text[self.at : after]
            self.at = min(after + 1, len(self.text))
            if (line.lstrip("\t") if tabs else line) == end:
                return

    def peek(self) -> str:
        """The next word or operator, which stays where it is."""
        self.blanks()
        at = self.at
        operator = re.compile(r";;&|;;|;&|&&|\|\||\|&|[;&|()\n]").match(self.text, at)
        if operator:
            return operator[0]
        while at < len(self.text) and self.text[at] not in META:
            at = end_of(self.text, at)
        return self.text[self.at : at]

    def takes(self, word: str) -> bool:
        if self.peek() != word:
            return False
        self.at += len(word)
        return True

    def expect(self, word: str) -> int:
        self.lines()
        if not self.takes(word):
            self.refuse(f"{word!r} is missing before {self.peek()!r}" if self.peek() else f"{word!r} is missing")
        return self.at

    def word(self) -> str:
        """The next word as it is written, without continued lines; an array such as `A=(b c)` is one, too."""
        self.blanks()
        start = self.at
        while self.at < len(self.text):
            substitutes = self.text.startswith(("<(", ">("), self.at)
            if self.text[self.at] in META and not substitutes:
                break
            self.at = end_of(self.text, self.at)
        if self.at == start:
            self.refuse(f"{self.text[start : start + 1]!r} is not expected here")
        return self.text[start : self.at]

    def word_or_assignment(self) -> str | Assignment:
        self.blanks()
        start = self.at
        if not (match := ASSIGNMENT.match(self.text, start)):
            return self.word()
        self.at = match.end()
        if self.text.startswith("(", self.at):
            self.at += 1
            return Assignment(match[1], match[2], bool(match[3]), self.array())
        value = "" if self.at >= len(self.text) or self.text[self.at] in META else self.word()
        return Assignment(match[1], match[2], bool(match[3]), value)

    def array(self) -> list[str]:
        words = []
        self.lines()
        while not self.takes(")"):
            words.append(self.word())
            self.lines()
        return words

    # ---- commands

    def sequence(self) -> Sequence:
        """Commands up to a word that ends them, which stays where it is."""
        sequence = Sequence(self.line, [])
        while True:
            self.lines()
            if self.at >= len(self.text) or self.peek() in ENDS:
                return sequence
            sequence.parts.append(self.list())
            self.blanks()
            if not (self.takes(";") or self.takes("&")) and self.peek() not in ("\n", "", *ENDS):
                self.refuse(f"{self.peek()!r} is not expected here")

    def list(self) -> Node:
        left = self.pipeline()
        while (operator := self.peek()) in ("&&", "||"):
            self.at += len(operator)
            self.lines()
            left = Both(left.line, operator, left, self.pipeline())
        return left

    def pipeline(self) -> Node:
        line = self.line
        if self.takes("!"):
            return Not(line, self.pipeline())
        if self.takes("time"):
            self.takes("-p")
        parts = [self.command()]
        while (operator := self.peek()) in ("|", "|&"):
            self.at += len(operator)
            self.lines()
            parts.append(self.command())
        return parts[0] if len(parts) == 1 else Pipeline(line, parts)

    def command(self) -> Node:
        word = self.peek()
        compound = {
            "if": self._if,
            "case": self._case,
            "for": self._for,
            "while": self._while,
            "until": self._while,
            "function": self._function,
            "{": self._group,
            "(": self._parentheses,
            "[[": self._test,
        }.get(word)
        if word in ("select", "coproc"):
            self.refuse(f"{word} is not supported")
        if compound:
            node = compound()
        elif re.compile(r"[\w:.-]+[ \t]*\([ \t]*\)").match(self.text, self.at):
            node = self._function()
        else:
            return self._simple()
        while self._redirect(node):
            pass
        return node

    def _simple(self) -> Command:
        node = Command(self.line)
        while True:
            self.blanks()
            if self._redirect(node):
                continue
            at_end = self.at >= len(self.text) or self.text[self.at] in "\n;&|()"
            if at_end:
                break
            word = self.word_or_assignment()
            declares = node.words and node.words[0] in ("declare", "export", "local", "readonly", "typeset")
            if isinstance(word, str) or declares:
                node.words.append(word)
            elif node.words and isinstance(word.value, str):  # an argument such as `a=b`
                plus, index = "+" * word.appends, "" if word.index is None else f"[{word.index}]"
                node.words.append(f"{word.name}{index}{plus}={word.value}")
            else:
                node.assignments.append(word)
        if not node.words and not node.assignments and not node.redirects:
            self.refuse(f"{self.peek()!r} is not expected here")
        return node

    def _redirect(self, node: Node) -> bool:
        self.blanks()
        match = REDIRECT.match(self.text, self.at)
        substitutes = re.compile(r"[<>]\(").match(self.text, self.at)
        if not match or substitutes:
            return False
        self.at = match.end()
        target = self.word()
        if match[2] in ("<<", "<<-"):
            self.documents.append((re.sub(r"['\"\\]", "", target), match[2] == "<<-"))
        node.redirects.append((match[1], match[2], target))
        return True

    def _if(self) -> Node:
        node = If(self.line, [], None)
        self.at += len("if")
        while True:
            condition = self.sequence()
            self.expect("then")
            node.branches.append((condition, self.sequence()))
            if not self.takes("elif"):
                break
        if self.takes("else"):
            node.otherwise = self.sequence()
        self.expect("fi")
        return node

    def _case(self) -> Node:
        self.at += len("case")
        node = Case(self.line, self.word(), [])
        self.expect("in")
        self.lines()
        while not self.takes("esac"):
            self.takes("(")
            patterns = [self.word()]
            while self.takes("|"):
                patterns.append(self.word())
            self.expect(")")
            body, end = self.sequence(), self.peek()
            if end != "esac":
                self.at += len(end)
            node.branches.append((patterns, body, end))
            self.lines()
        return node

    def _for(self) -> Node:
        line = self.line
        self.at += len("for")
        self.blanks()
        if self.text.startswith("((", self.at):
            first, condition, step = f"{self._double_parentheses()};;".split(";")[:3]
            return Counting(line, first, condition, step, self._body())
        name, words = self.word(), ['"$@"']
        self.lines()
        if self.takes("in"):
            words = []
            while self.peek() not in (";", "\n", ""):
                words.append(self.word())
        return For(line, name, words, self._body())

    def _body(self) -> Node:
        self.blanks()
        self.takes(";")
        self.expect("do")
        body = self.sequence()
        self.expect("done")
        return body

    def _while(self) -> Node:
        line, until = self.line, self.peek() == "until"
        self.at += len("while")
        return While(line, self.sequence(), self._body(), until)

    def _function(self) -> Node:
        line = self.line
        self.takes("function")
        name = self.word()
        if self.takes("("):
            self.expect(")")
        self.lines()
        return Function(line, name, self.command())

    def _group(self) -> Node:
        self.at += 1
        body = self.sequence()
        self.expect("}")
        return Sequence(body.line, [body])

    def _parentheses(self) -> Node:
        line = self.line
        if self.text.startswith("((", self.at) and end_of_arithmetic(f"${self.text[self.at :]}", 0):
            return Arithmetic(line, self._double_parentheses())
        self.at += 1
        body = self.sequence()
        self.expect(")")
        return Subshell(line, body)

    def _double_parentheses(self) -> str:
        length = end_of_arithmetic(f"${self.text[self.at :]}", 0)
        if length is None:
            self.refuse("'))' is missing")
            raise AssertionError
        start, self.at = self.at, self.at + length - 1
        return self.text[start + 2 : self.at - 2]

    def _test(self) -> Node:
        node = Test(self.line, [])
        self.at += 2
        self.lines()
        while not self.takes("]]"):
            follows_match = node.words[-1:] == ["=~"]
            operator = re.compile(r"&&|\|\||[()<>]").match(self.text, self.at)
            if operator and not follows_match:
                self.at = operator.end()
                node.words.append(operator[0])
            else:
                node.words.append(self._test_word(follows_match))
            self.lines()
        return node

    def _test_word(self, is_expression: bool) -> str:
        if not is_expression:
            return self.word()
        start = self.at  # a regular expression, in which parentheses and bars are no operators
        while self.text[self.at] not in " \t\n":
            self.at = end_of(self.text, self.at)
        return self.text[start : self.at]

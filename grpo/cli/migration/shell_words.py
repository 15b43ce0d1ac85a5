"""Words of a shell script with their variables, defaults and sums filled in, as bash expands them.

A text that nothing here can know has a mark in its place: the output of a program, a variable that is not set, a
secret. It travels with the text, so that an option or a condition that has it names the variable to give.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import escape

from grpo.cli.migration.shell_patterns import WILD, alternatives, replaced, without_end, without_start
from grpo.cli.migration.shell_state import is_empty, is_known, mark, names_in
from grpo.cli.migration.shell_sums import Sums
from grpo.cli.migration.shell_tree import Node

FIELDS = re.compile("(?:\ue000.*?\ue002|[^ \t\n])+|[ \t\n]+", re.S)
BRACES = re.compile(r"(?<!\\)\{[^{}]*(,|\.\.)[^{}]*\}")
PARAMETER = {"Type", "Pos", "End", "Text", "Dollar", "Short", "Rbrace", "Param", "Index", "Exp", "Repl", "Slice"}
PARAMETER |= {"Excl", "Length"}
Piece = tuple[str, str]
"""A text and how it is treated: `literal`, `quoted`, `split` at its blanks, or `break` between two words."""
DEFAULTS = (":-", "-", ":?", "?", ":+", "+", ":=", "=")
LETTERS = {
    "^^": str.upper,
    ",,": str.lower,
    "^": lambda text: text[:1].upper() + text[1:],
    ",": lambda text: text[:1].lower() + text[1:],
}
CUTS = {"#": (without_start, False), "##": (without_start, True), "%": (without_end, False), "%%": (without_end, True)}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class Words(Sums):
    """Expands the words of a shell."""

    def substitute(self, node: Node) -> str:
        raise NotImplementedError

    def fields(self, word: Node) -> list[str]:
        """The words that one word becomes: arrays and blanks of variables make several, or none."""
        expanded = self._expanded(word)
        return [field for parts in expanded for field in self._fields(parts)]

    def _expanded(self, word: Node) -> list[list[Node]]:
        """The parts of each word that `{a,b}` in a word stands for."""
        parts = word["Parts"]
        literal = "".join(part["Value"] if part["Type"] == "Lit" else "x" for part in parts)
        if not BRACES.search(literal):
            return [parts]
        for number, part in enumerate(parts):
            texts = alternatives(part["Value"]) if part["Type"] == "Lit" and "\\" not in part["Value"] else None
            if texts:
                self.spend(len(texts) * len(word["Text"]))
                before, after = parts[:number], parts[number + 1 :]
                words = [word | {"Parts": [*before, part | {"Value": text}, *after]} for text in texts]
                return [each for one in words for each in self._expanded(one)]
        self.refuse(word["Text"])

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
            if how != "quoted" and "[:" in text:
                self.refuse(word["Text"])
            parts.append(escape(text) if how == "quoted" else text.replace("[^", "[!"))
        return "".join(parts)

    def expression(self, word: Node) -> str:
        """Return the word as a regular expression. Quoted text is matched literally."""
        pieces = self.pieces(word["Parts"])
        return "".join(re.escape(text) if how == "quoted" else text for text, how in pieces)

    def pieces(self, parts: list[Node], quoted: bool = False) -> Iterator[Piece]:
        """The texts of a word, and how each is treated."""
        for text, how in self._pieces(parts, quoted):
            self.spend(len(text) + 10)
            yield text, how

    def _pieces(self, parts: list[Node], quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        for number, part in enumerate(parts):
            kind, text = part["Type"], part.get("Value", "")
            if kind == "Lit":
                yield from self._literal(text, quoted, first=number == 0)
            elif kind == "SglQuoted":
                yield self._single(text, part) if part.get("Dollar") else text, "quoted"
            elif kind == "DblQuoted" and not part.get("Dollar"):
                inside = list(self.pieces(part.get("Parts", []), quoted=True))
                if inside or "Parts" not in part:  # else it is an array without elements, and no word
                    yield "", "quoted"
                yield from inside
            elif kind == "ParamExp":
                yield from self._parameter(part, quoted)
            elif kind == "ArithmExp":
                yield self.computed(part["X"], part["Text"]), how
            elif kind == "CmdSubst":
                yield self.substitute(part), how
            elif kind == "ProcSubst":
                yield mark(part["Text"]), how
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

    def _single(self, text: str, part: Node) -> str:
        r"""The text of `$'a\tb'`."""
        if set(re.findall(r"\\(.)", text, re.S)) - ESCAPES.keys():
            self.refuse(part["Text"])
        return re.sub(r"\\(.)", lambda found: ESCAPES[found[1]], text)

    # ---- variables

    def _parameter(self, node: Node, quoted: bool) -> Iterator[Piece]:
        how = "quoted" if quoted else "split"
        name, operation = node["Param"]["Value"], node.get("Exp", {})
        index = self.index(node, name)
        sign = operation.get("Op", "")
        if node.keys() - PARAMETER or (sign and sign not in (*DEFAULTS, *CUTS, *LETTERS)):
            self.refuse(node["Text"])
        several = name in ("@", "*") or index in ("@", "*")
        if node.get("Excl") and not several:
            name = self._named(name, node)
        if node.get("Length"):
            yield self._length(name, index, several, node), how
        elif several and sign in DEFAULTS and not self._is_used(name, sign):
            yield from self._default(node, how, quoted)
        elif several:
            yield from self._several(self._changed(name, node, sign), how, joined=quoted and "*" in (name, index))
        elif sign in DEFAULTS:
            yield from self._defaulted(name, self.get(name, index), node, quoted)
        else:
            yield self._value_of(name, index, node), how

    def index(self, node: Node, name: str) -> str:
        """The index of an element, with the value of its variable."""
        if "Index" not in node:
            return ""
        text = node["Index"]["Text"]
        if isinstance(self.variables.get(name), dict) and node["Index"]["Type"] == "Word":
            return self.text(node["Index"])
        if text in ("@", "*") or node["Index"]["Type"] != "Word":
            return text if text in ("@", "*") else self.computed(node["Index"], text)
        if text.isidentifier() and text in self.variables:
            return self.get(text) or "0"
        return self.text(node["Index"])

    def _named(self, name: str, node: Node) -> str:
        """The variable whose name a variable holds, for `${!name}`."""
        other = self.get(name)
        if other is None or not other.isidentifier():
            self.refuse(node["Text"])
        return other

    def _length(self, name: str, index: str, several: bool, node: Node) -> str:
        if several:
            return str(len(self.all(name)))
        value = self.get(name, index)
        if value is None:
            return self.missing(name, node["Text"])
        return str(len(value)) if is_known(value) else mark(node["Text"], *names_in(value)[:1])

    def _is_used(self, name: str, sign: str) -> bool:
        """Return whether `${a[@]:-...}` is the elements of the array, or nothing, and not the default."""
        if sign[-1] in "?=":
            self.refuse()
        values = self.all(name)
        is_set = any(values) if sign[0] == ":" else bool(values)
        return is_set != (sign[-1] == "+")

    def _default(self, node: Node, how: str, quoted: bool) -> Iterator[Piece]:
        default = node["Exp"].get("Word")
        for text, each in self.pieces(default["Parts"] if default else [], quoted):
            yield text, how if each == "literal" else each

    def _changed(self, name: str, node: Node, sign: str) -> list[str]:
        """The elements of an array, each of them changed as `${a[@]%.x}` and the like ask for."""
        values = self.all(name)
        if node.get("Excl"):
            by_name = self.variables.get(name)
            return [*by_name] if isinstance(by_name, dict) else [str(number) for number in range(len(values))]
        if "Repl" in node or sign in LETTERS:
            self.refuse(node["Text"])
        if sign in DEFAULTS:
            return [] if sign[-1] == "+" else values
        if "Slice" in node:
            values = [self.script, *values] if name in ("@", "*") else values
            start, end = self._slice(node["Slice"], len(values), node)
            return values[start:end]
        return [self._operated(value, node, sign) for value in values] if sign else values

    def _value_of(self, name: str, index: str, node: Node) -> str:
        value, sign = self.get(name, index), node.get("Exp", {}).get("Op", "")
        changes = sign or {"Repl", "Slice"} & node.keys()
        if value is None:
            return self.missing(name, node["Text"])
        if not changes:
            return value
        if not is_known(value):
            return mark(node["Text"], *names_in(value)[:1])
        if "Repl" in node:
            return self._replaced(value, node["Repl"])
        if "Slice" in node:
            start, end = self._slice(node["Slice"], len(value), node)
            return value[start:end]
        return self._operated(value, node, sign)

    def _operated(self, value: str, node: Node, sign: str) -> str:
        """A text without what a pattern takes of its start or its end, or in other letters."""
        word = node["Exp"].get("Word")
        if sign in LETTERS:
            return self.refuse(node["Text"]) if word else LETTERS[sign](value)
        pattern = self.pattern(word) if word else ""
        if not is_known(pattern):
            return mark(node["Text"], *names_in(pattern)[:1])
        self.spend(len(value) ** 2 // 10)  # each start or end is tried
        cut, longest = CUTS[sign]
        return cut(value, pattern, longest)

    def _slice(self, node: Node, length: int, whole: Node) -> tuple[int, int]:
        """Return the first character of `${text:start:length}` and the one after its last."""
        texts = [self.computed(node[name], whole["Text"]) if name in node else "" for name in ("Offset", "Length")]
        if not is_known("".join(texts)):
            self.refuse(whole["Text"])
        start = int(texts[0] or 0)
        start = max(start + length, 0) if start < 0 else start
        taken = int(texts[1] or length)
        return start, (length + taken if taken < 0 else start + taken)

    def _replaced(self, value: str, replacement: Node) -> str:
        old, new = self.pattern(replacement["Orig"]), self.text(replacement.get("With"))
        if not is_known(old + new):
            self.refuse(replacement["Orig"]["Text"])
        every = bool(replacement.get("All"))
        tried = len(value) if WILD.search(old) else 0  # ends of a part, from each start
        self.spend(len(value) * (tried // 10 + len(new)))
        return replaced(value, f"[{old[0]}]{old[1:]}" if every and old[:1] in ("#", "%") else old, new, every)

    @staticmethod
    def _several(values: list[str], how: str, joined: bool) -> Iterator[Piece]:
        if joined:
            yield " ".join(values), how
            return
        for number, value in enumerate(values):
            if number:
                yield " ", "break"
            yield value, how

    def _defaulted(self, name: str, value: str | None, node: Node, quoted: bool) -> Iterator[Piece]:
        how, sign = "quoted" if quoted else "split", node["Exp"]["Op"]
        absent = is_empty(value or "") if sign[0] == ":" else value is None
        if absent is None and value is not None:
            yield mark(node["Text"], *names_in(value)[:1]), how
        elif absent == (sign[-1] == "+"):
            yield ("" if sign[-1] == "+" else value or ""), how
        elif sign[-1] == "?":
            yield self.missing(name, node["Text"], required=True), how
        elif sign[-1] == "=":
            self.assign(name, self.text(node["Exp"].get("Word")))
            yield self.get(name) or "", how
        else:
            yield from self._default(node, how, quoted)

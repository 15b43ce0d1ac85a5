"""Words of a command as Hydra 1.3 reads them: `key=value`, `+key=value`, `~key`, and the values.

Nothing is composed. A value is read as Hydra's grammar has it: `{a:1}` is a mapping, `yes` and `12:30` are texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from grpo.cli.migration.shell_state import MARK, UNSET, is_known

OF_HYDRA = {"-cn": "--config-name", "-cp": "--config-path", "-cd": "--config-dir"}  # other files of defaults
OF_HYDRA |= {name: name for name in OF_HYDRA.values()}
NESTED = re.compile(r"\$\{[^{}]*\}")
KEY = re.compile("((?:\ue000.*?\ue002|[^=\ue000])*)=(.*)", re.S)  # up to the first = that is no part of a mark
NUMERALS = r"(?:0|[1-9](?:_?\d)*)"
INTEGER = re.compile(rf"[-+]?{NUMERALS}")
FRACTION = rf"(?:{NUMERALS}?\.\d(?:_?\d)*|{NUMERALS}\.?)"
FLOAT = re.compile(rf"[-+]?(?:{FRACTION}(?:[eE][-+]?\d(?:_?\d)*)?|inf|nan)", re.I)
WORDS = {"null": None, "true": True, "false": False}
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
BLANKS_AROUND = re.compile(r"^[ \t]+|(?<!\\)[ \t]+$")
REFERENCE = re.compile(r"\$\{([^${}]+)\}")
DEEPEST = 20


class Unreadable(ValueError):
    """A value that Hydra's grammar does not have; it stays a text."""


@dataclass(frozen=True)
class Override:
    """One word of a command that sets an option, or deletes it."""

    name: str
    text: str
    deletes: bool = False

    @property
    def is_known(self) -> bool:
        return is_known(self.name + self.text)


def overrides(words: list[str]) -> Iterator[Override]:
    """The overrides among the words of a command, as they are written. A word of which nothing is known may be one."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in OF_HYDRA:
            joined[-1] = f"{OF_HYDRA[joined[-1]]}={word}"
        else:
            joined.append(word)
    for word in joined:
        found = KEY.fullmatch(word)
        name, text = found.groups() if found else (word, "")
        name = OF_HYDRA.get(name, name)
        if name.startswith("-") and name not in OF_HYDRA:
            continue
        if name.startswith("~"):
            yield Override(name[1:], text, deletes=True)
        elif found:
            yield Override(name.lstrip("+"), text)
        elif any(kind != UNSET for kind, _, _ in MARK.findall(word)):
            yield Override(word, "")


def value_of(text: str) -> object:
    """The value of an override. Raises ValueError for several values, of which Hydra would make several runs.

    >>> value_of("1e-6"), value_of("[a, 'b c']"), value_of("{a:1}"), value_of("yes"), value_of("")
    (1e-06, ['a', 'b c'], {'a': 1}, 'yes', '')
    """
    reader = _Reader(text)
    try:
        value = reader.element("")
        reader.skip_blanks()
    except Unreadable:
        return text
    if reader.at < len(text):
        if text[reader.at] != ",":
            return text
        raise ValueError(f"{text}: these are several values, of which Hydra makes several runs; give one, or [{text}]")
    return value


class _Reader:
    """Reads a text from its start to its end."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def element(self, ends: str) -> object:
        """A value, up to a comma or one of `ends` outside of quotes."""
        self.skip_blanks()
        start = self.text[self.at : self.at + 1]
        if start in ("[", "{"):
            self.depth += 1
            if self.depth > DEEPEST:
                raise Unreadable
            value = self._list() if start == "[" else self._mapping()
            self.depth -= 1
            return value
        if start in ("'", '"'):
            return self._quoted(start)
        return typed(self._primitive(f"{ends},"))

    def skip_blanks(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def _take(self, choices: str) -> str:
        """The next character, which must be one of `choices`."""
        self.skip_blanks()
        found = self.text[self.at : self.at + 1]
        if not found or found not in choices:
            raise Unreadable
        self.at += 1
        return found

    def _is_next(self, end: str) -> bool:
        self.skip_blanks()
        return self.text[self.at : self.at + 1] == end

    def _list(self) -> list[object]:
        self._take("[")
        items: list[object] = []
        if self._is_next("]"):
            self._take("]")
            return items
        while True:
            items.append(self.element("]"))
            if self._take(",]") == "]":
                return items

    def _mapping(self) -> dict[object, object]:
        self._take("{")
        items: dict[object, object] = {}
        if self._is_next("}"):
            self._take("}")
            return items
        while True:
            key = typed(self._primitive(":,}"))
            self._take(":")
            items[key] = self.element("}")
            if self._take(",}") == "}":
                return items

    def _quoted(self, quote: str) -> str:
        found = re.compile(rf"{quote}((?:\\.|[^{quote}\\])*){quote}", re.S).match(self.text, self.at)
        if found is None:
            raise Unreadable
        self.at = found.end()
        return found[1].replace(f"\\{quote}", quote)

    def _primitive(self, ends: str) -> str:
        """A text without quotes, up to one of `ends` that is neither escaped nor within `${...}`."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            if self.text[self.at] in "[]{}'\"":
                raise Unreadable
            reference = NESTED.match(self.text, self.at)
            escape = ESCAPED.match(self.text, self.at)
            self.at = reference.end() if reference else escape.end() if escape else self.at + 1
        return BLANKS_AROUND.sub("", self.text[start : self.at])


def typed(text: str) -> object:
    """The value of a text without quotes."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return ESCAPED.sub(r"\1", text)


def resolved(value: object, look_up: Callable[[str], object], depth: int = 0) -> object:
    """The value with `${key}` replaced by what `look_up` gives for the key. Raises KeyError for a key without a value.

    >>> resolved("${data.n}0", {"data.n": 5}.__getitem__), resolved(["${data.n}"], {"data.n": 5}.__getitem__)
    ('50', [5])
    """
    if isinstance(value, list):
        return [resolved(item, look_up, depth) for item in value]
    if isinstance(value, Mapping):
        return {key: resolved(item, look_up, depth) for key, item in value.items()}
    if not isinstance(value, str) or not REFERENCE.search(value):
        return value
    if depth > DEEPEST:
        raise KeyError(value)
    whole = REFERENCE.fullmatch(value)
    if whole:
        return resolved(look_up(whole[1]), look_up, depth + 1)
    return REFERENCE.sub(lambda found: str(resolved(look_up(found[1]), look_up, depth + 1)), value)

"""The console of every command, on which the text of others is only text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rewards.isolation.output import escaped


def visible(text: str, limit: int = 400, encoding: str = "utf-8") -> str:
    r"""`text` for a terminal: control characters and what `encoding` lacks as escapes, the middle cut at `limit`.

    Model text may hold anything, terminal escape sequences and right-to-left marks included.

    >>> visible("2 + 2\n= \x1b[31m4")
    '2 + 2\\n= \\x1b[31m4'
    >>> visible("0123456789", limit=4)
    '01[... 6 characters ...]89'
    """
    if len(text) > limit:
        head, tail = math.ceil(limit / 2), limit // 2
        text = f"{text[:head]}[... {len(text) - limit} characters ...]{text[len(text) - tail :]}"
    return escaped(text, keep="").encode(encoding, "backslashreplace").decode(encoding)


class Terminal(Console):
    """The console of every command. Text on it is only text, whoever wrote it: control characters are shown as
    escapes, and [brackets] and :words: mean nothing. What moves is drawn on a terminal alone, also where FORCE_COLOR
    asks for colours in a file. The cursor is never hidden, so a command that is killed leaves it as it was."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        if "force_terminal" not in options:
            self.is_interactive = self.is_interactive and self.file.isatty()

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))

"""Foreign text on a terminal: control characters become visible and lose their effect."""

import logging

LINES = "\n\t"


def escaped(text: str, keep: str = LINES) -> str:
    r"""`text` with everything that a terminal does not show as a character written as an escape, except `keep`.

    That is: control characters (terminals act on some of them), marks that turn the direction of writing, and lone
    surrogates, which no terminal can encode.

    >>> escaped("bell\x07, red \x1b[31m\nsecond line")
    'bell\\x07, red \\x1b[31m\nsecond line'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class EscapingFormatter(logging.Formatter):
    """Warnings as Python prints them by default, escaped: they may quote a reward or a checkpoint."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))

"""What worker processes print: on standard error, with control characters made visible, and within limits."""

from __future__ import annotations

import codecs
import os
import sys
import threading
import time
from contextlib import suppress
from typing import IO

LINES = "\n\t"
IN_A_CALL, IN_ALL = 16 << 10, 1 << 20  # bytes that are shown; a worker that prints more goes on, unseen


def escaped(text: str, keep: str = LINES) -> str:
    r"""The text with everything that a terminal does not show as a character written as an escape, except `keep`.

    That is: control characters (terminals act on some of them), marks that turn the direction of writing, and lone
    surrogates, which no terminal can encode.

    >>> escaped("bell\x07, red \x1b[31m\nsecond line")
    'bell\\x07, red \\x1b[31m\nsecond line'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Output:
    """Shows what all workers of a pool print, each read by a thread of its own."""

    def __init__(self) -> None:
        self._call, self._all = IN_A_CALL, IN_ALL
        self._readers: list[threading.Thread] = []

    def begin_call(self) -> None:
        """The next IN_A_CALL bytes are shown."""
        self._call = min(IN_A_CALL, self._all)

    def follow(self, stream: IO[bytes]) -> None:
        """Read a worker's stream until it ends."""
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        self._readers.append(threading.Thread(target=self._read, args=(stream,), daemon=True, name="output"))
        self._readers[-1].start()

    def finish(self) -> None:
        """Wait until everything is shown; not for a process that a worker has put into another session."""
        end = time.monotonic() + 1.0
        for reader in self._readers:
            reader.join(max(0.0, end - time.monotonic()))

    def _read(self, stream: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        with stream:
            while chunk := os.read(stream.fileno(), 1 << 16):
                shown = chunk[: max(self._call, 0)]
                self._call -= len(chunk)
                self._all -= len(shown)
                if not shown:
                    continue
                self._show(escaped(decoder.decode(shown)))
                if self._call < 0:
                    limit = f"{IN_A_CALL >> 10} KiB in one call" if self._all else f"{IN_ALL >> 10} KiB in all"
                    self._show(f"\n(rewards, tools or agents printed more than {limit}: the rest is not shown)\n")

    @staticmethod
    def _show(text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # standard error is closed, or cannot encode it
            sys.stderr.write(text)
            sys.stderr.flush()

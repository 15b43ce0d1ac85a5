"""What messages call the flags of the command line, and what a program calls them that hands them over as arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_IN_PYTHON = {
    r"did you mean --resume\?( \(on the command line, [^)]*\))?": 'did you mean train(config, resume="auto")?',
    r"`?--resume auto --force`?": 'resume="auto", force=True',
    r"`?--resume auto`?": 'resume="auto"',
    r"--force\b": "force=True",
    r"--(resume|stop_after)\b": r"\1",
    r"see --help all for all options": "`quartet reference` prints all options",
}
_commands = 0


def in_python(message: str) -> str:
    """
    >>> in_python("stopped after step 3; go on with --resume auto")
    'stopped after step 3; go on with resume="auto"'
    """
    for flag, argument in _IN_PYTHON.items():
        message = re.sub(flag, argument, message)
    return message


@contextmanager
def command_line() -> Iterator[None]:
    """Inside it, a command calls the functions that programs may call too: messages keep their flags."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


@contextmanager
def python_words() -> Iterator[None]:
    """For a function that programs call: what it raises names arguments in place of flags."""
    try:
        yield
    except Exception as error:
        if not _commands:
            error.args = tuple(in_python(part) if isinstance(part, str) else part for part in error.args)
        raise

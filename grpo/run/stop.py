"""How the user ends what runs: a run at a step boundary, saved, any other command with a line; each with its exit code.

All signals are handled here. Importing this module is quick: they can be handled before anything else is loaded.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# SIGBREAK is what Windows has in place of SIGHUP.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in _ENDING if hasattr(signal, name))
STOPPING = "stopping at the last whole step; Ctrl-C again ends the run at once and saves nothing"
ASKED = ".stop"  # the file in a run folder with the signal that was sent to the process that has started this one


@contextmanager
def last_words(text: str) -> Iterator[None]:
    """Prints `text` on standard error if this process ends inside without a word of its own.

    The kernel kills it when memory is full, and Ray leaves by _exit when its raylet has died. A shell of its own
    session waits for the end of a pipe, whose other end is here.
    """
    command = ["sh", "-c", 'read -r left || printf "%s\\n" "$LAST_WORDS" >&2']
    settings: dict[str, Any] = {"env": os.environ | {"LAST_WORDS": text}, "stdin": subprocess.PIPE}
    try:
        waits = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, **settings)
    except OSError:  # there is no shell, or no room for it
        yield
        return
    try:
        yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            waits.communicate(b"\n", timeout=5)
        waits.kill()


class Stopped(KeyboardInterrupt):
    """The user has ended what runs, by a signal or by --stop_after. Nothing may take it for a failure of its own.

    `number` is the signal's; a run that --stop_after has ended exits as after SIGTERM. `saved`: a run has ended at a
    step boundary, and everything up to there is saved. Until then the work in progress is given up, and nothing of it
    has reached the policy. `everywhere`: every rank of the run raises it at this point.
    """

    saved = False

    def __init__(self, message: str = "", number: int = signal.SIGTERM, *, everywhere: bool = False) -> None:
        by = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        super().__init__(message or by)
        self.number, self.everywhere = number, everywhere

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def at(self, step: int, of: str = "") -> None:
        """The run ends after this step, which is saved; the first call counts. `of` completes "after step 3"."""
        if not self.saved:
            where = f"after step {step}{of}" if step else f"before step 1{of}"
            self.args, self.saved = (f"stopped {where}; go on with --resume auto",), True


class Signals:
    """What the signals that ask this process to end do. The process has one such object, `signals`.

    The first one ends the process at once, with one line, while nothing has begun: an exception in the middle of an
    import may come out of it as another one, or be lost. Once a command `unwinds` there is work to clean up, and
    Stopped is raised where it is. Where a note is taken, `check` raises it later. The second one ends the process
    without any clean-up.

    `number` is that of the signal that came, 0 before. A signal that the process was started to ignore stays ignored,
    as SIGHUP is under `nohup`. SIGINT does not: a script's shell starts its background jobs so, and who sends it means
    it.
    """

    def __init__(self) -> None:
        self.number, self.unwinds = 0, False
        self.asked_by: Path | None = None  # a file in which another process tells what came there
        self._note: Callable[[int], object] | None = None
        self._leave: Callable[[], None] | None = None
        self._once = False
        self._terminals: list[int] = []

    def listen(self, note: Callable[[int], object] | None = None, *, once: bool = False) -> Callable[[], None]:
        """Listens: from now on the first signal calls `note`, where there is one, and ends nothing. With `once` a
        second one has the effect that it had before. That comes back when what is returned is called."""
        former = vars(self).copy()
        usual: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        usual = {n: handler for n, handler in usual.items() if handler != signal.SIG_IGN or n == signal.SIGINT}

        def leave() -> None:
            if self._leave is leave:
                vars(self).update(former)
                _handle(usual)

        self.number, self._note, self._leave, self._once = 0, note, leave, once
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        _handle(dict.fromkeys(usual, self._came))
        return leave

    @contextmanager
    def heard(self, note: Callable[[int], object] | None = None, *, once: bool = False) -> Iterator[None]:
        """`listen` for what is inside."""
        leave = self.listen(note, once=once)
        try:
            yield
        finally:
            leave()

    def check(self) -> None:
        """Called where the work in progress can be given up: raises Stopped once a signal has come."""
        if self.asked_by and self.asked_by.exists():
            self.number = self.number or int(self.asked_by.read_text().split()[0])
        if self.number:
            raise Stopped(number=self.number)

    def stopped(self, error: BaseException) -> Stopped | None:
        """Tells how the user has ended the command that raises `error`, or None. A library may have made another
        exception of ours."""
        if isinstance(error, Stopped):
            return error
        number = self.number or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        return Stopped(number=number) if number else None

    def _came(self, number: int, frame: FrameType | None) -> None:
        note, self.number = self._note, number
        if self._once and self._leave:
            self._leave()
        else:
            _handle({n: signal.SIG_DFL for n in SIGNALS if signal.getsignal(n) == self._came})
        if number == getattr(signal, "SIGHUP", None):
            for gone in [descriptor for descriptor in self._terminals if not os.isatty(descriptor)]:
                os.dup2(os.open(os.devnull, os.O_WRONLY), gone)  # writing to a closed terminal is an error
        if note:
            note(number)
            return
        stopped = Stopped(number=number)
        if self.unwinds:
            raise stopped
        with suppress(OSError):
            os.write(2, f"quartet: {stopped}\n".encode())
        os._exit(stopped.exit_code)


signals = Signals()


def say_stopping(number: int, show: Callable[[str], bool] = lambda text: False) -> None:
    """Tell the user after Ctrl-C what a run does now: by `show`, or where that returns False on the terminal."""
    if number == signal.SIGINT and not show(STOPPING) and os.isatty(2):
        os.write(2, f"\n{STOPPING}\n".encode())


def ignore_signals() -> None:
    _handle(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _handle(handlers: Mapping[int, Any]) -> None:
    with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        for number, handler in handlers.items():
            signal.signal(number, handler)

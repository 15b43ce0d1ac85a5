"""How a run is asked to end early, and how it ends: at a step boundary, saved, with an exit code of its own.

All signals are handled here. Importing this module is quick: they can be handled before anything else is loaded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from policies.files.atomic import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from rollout.depth import CostTable, Workload
    from rollout.group import Prompt, RolloutGroup
    from rollout.pool import OnFinished, Pool
    from rollout.publication.digests import Held
    from rollout.sampling import SamplingParams

# SIGBREAK is what Windows has in place of SIGHUP.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in _ENDING if hasattr(signal, name))
KEEP_S = 0.02
STOPPING = "stopping at the last whole step; Ctrl-C again ends the run at once and saves nothing"
_SIGNAL = signal.signal
ASKED = ".stop"  # the file in a run folder with the signal that was sent to the process that has started this one
asked_by: Path | None = None


@contextmanager
def last_words(text: str) -> Iterator[None]:
    """Prints `text` on standard error if this process ends inside without a word of its own.

    The kernel kills it when memory is full, and Ray leaves by _exit when its raylet has died. A shell of its own
    session waits for the end of a pipe, whose other end is here.
    """
    command = ["sh", "-c", 'read -r left || printf "%s\\n" "$LAST_WORDS" >&2']
    given: dict[str, Any] = {"env": os.environ | {"LAST_WORDS": text}, "stdin": subprocess.PIPE}
    try:
        waits = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, **given)
    except OSError:  # there is no shell, or no room for it
        yield
        return
    try:
        yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            waits.communicate(b"\n", timeout=5)
        waits.kill()


class Stopped(Exception):
    """A signal or --stop_after ended the run at a step boundary; everything up to there is saved.

    `number` is the signal's. A run that --stop_after has ended exits as after SIGTERM. `everywhere`: every rank of the
    run raises it at this point.
    """

    everywhere = True

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number or signal.SIGTERM


class GivenUp(Exception):
    """A signal ended the work in progress between two micro-batches; nothing of it has reached the policy. `number` is
    the signal's."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(number)
        self.number = number


class Interrupted(KeyboardInterrupt):
    """A signal ends a command that is not a run; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(said_of(number))
        self.number = number


def said_of(number: int) -> str:
    """What the user reads of a signal that ends a command."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


class Handler:
    """Inside it the signals that ask a process to end call `on_signal`; outside, what they called before.

    `number` is that of the signal that came, 0 before. A signal that the process was started to ignore stays ignored,
    as SIGHUP is under `nohup`. SIGINT does not: a script's shell starts its background jobs so, and who sends it means
    it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._usual: dict[int, Any] = {}
        self._terminals: list[int] = []

    def on_signal(self, number: int) -> None:
        raise NotImplementedError

    def after_the_first(self) -> dict[int, Any]:
        """What the next signal does: it ends the process at once, without any clean-up."""
        return dict.fromkeys(self._usual, signal.SIG_DFL)

    def listen(self) -> None:
        """Install our handlers again; another library may have replaced them."""
        _handle(self.after_the_first() if self.number else dict.fromkeys(self._usual, self._note))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside it our handlers stay installed, in the main thread, also where a library installs its own.

        Ray does so in Python, which is refused, and in C++, unseen by Python: ours come back every few milliseconds.
        """

        def refuse(number: int, handler: Any) -> Any:
            return signal.getsignal(number) if number in self._usual else _SIGNAL(number, handler)

        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            yield  # Windows has no timers of this kind
            return

        def again(*_: object) -> None:
            if signal.signal is not refuse:  # it is over: a timer that is set now would end the process
                return
            self.listen()
            signal.setitimer(signal.ITIMER_REAL, KEEP_S)  # set anew each time: a fork starts over at every signal

        usual = _SIGNAL(signal.SIGALRM, again)
        former = signal.setitimer(signal.ITIMER_REAL, KEEP_S)
        signal.signal = refuse  # type: ignore[assignment]
        try:
            yield
        finally:
            signal.signal = _SIGNAL
            signal.setitimer(signal.ITIMER_REAL, *former)
            _SIGNAL(signal.SIGALRM, usual)
            self.listen()

    def __enter__(self) -> Self:
        usual = {number: signal.getsignal(number) for number in SIGNALS}
        kept = {n: h for n, h in usual.items() if h != signal.SIG_IGN or n == signal.SIGINT}
        self._usual = {number: signal.SIG_DFL if h is None else h for number, h in kept.items()}
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _handle(self._usual)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.listen()
        if number == getattr(signal, "SIGHUP", None):
            for gone in [descriptor for descriptor in self._terminals if not os.isatty(descriptor)]:
                os.dup2(os.open(os.devnull, os.O_WRONLY), gone)  # writing to a closed terminal is an error
        self.on_signal(number)


class CommandSignals(Handler):
    """A signal ends the command with one line and no traceback.

    It does so at once, inside the handler, while nothing has begun: an exception in the middle of an import may come
    out of it as another one, or be lost. Once it `unwinds` there is work to clean up, and it raises Interrupted.
    """

    unwinds = False

    def on_signal(self, number: int) -> None:
        if self.unwinds:
            raise Interrupted(number)
        with suppress(OSError):
            os.write(2, f"quartet: {said_of(number)}\n".encode())
        os._exit(128 + number)


class StopSignal(Handler):
    """Inside it the first signal sets `asked`, for the work to notice; a second one ends the process.

    `check` raises GivenUp once a stop was asked for: it is called where the work can be given up. By default the second
    signal ends the process at once, without any clean-up. With `at_once=False` it has the effect that it had outside.
    `tell` is a file for other processes, which read there what came (`asked_by`). `show` is called with what to tell
    the user after Ctrl-C; where it returns False, or is None, that is written to the terminal here.
    """

    def __init__(
        self, *, at_once: bool = True, tell: Path | None = None, show: Callable[[str], bool] | None = None
    ) -> None:
        super().__init__()
        self._at_once, self._tell, self._show = at_once, tell, show

    @property
    def asked(self) -> bool:
        return self.number != 0

    @property
    def name(self) -> str:
        """Of the signal that asked, such as SIGTERM."""
        return signal.Signals(self.number).name if self.asked else "none"

    def check(self) -> None:
        if asked_by and asked_by.exists():
            self.number = self.number or int(asked_by.read_text().split()[0])
        if self.asked:
            raise GivenUp(self.number)

    def stopped(self, step: int, of: str = "") -> Stopped:
        """For a run that ends after this step. `of` completes "after step 3"."""
        where = f"after step {step}{of}" if step else f"before step 1{of}"
        return Stopped(f"stopped {where}; go on with --resume auto", self.number)

    def after_the_first(self) -> dict[int, Any]:
        return super().after_the_first() if self._at_once else self._usual

    def on_signal(self, number: int) -> None:
        if self._tell:
            self._tell.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._tell, str(number))
        shown = number != signal.SIGINT or not self._at_once or (self._show and self._show(STOPPING))
        if not shown and 2 in self._terminals:
            os.write(2, f"\n{STOPPING}\n".encode())


def ignore_signals() -> None:
    _handle(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _handle(handlers: Mapping[int, Any]) -> None:
    with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        for number, handler in handlers.items():
            _SIGNAL(number, handler)


class InterruptiblePool:
    """A pool whose sampling is given up once a stop was asked for. A publication that a stop cuts short raises nothing:
    what was learned counts, and the next sampling is given up."""

    def __init__(self, pool: Pool, stop: StopSignal) -> None:
        self.pool, self.stop = pool, stop

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        with suppress(GivenUp):
            self.pool.publish(weights, version)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        def forward(ended: int) -> None:
            self.stop.check()
            if on_finished:
                on_finished(ended)

        self.stop.check()
        return self.pool.sample(prompts, params, forward)

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """Nothing once a stop was asked for, since a publication may have been cut short."""
        try:
            self.stop.check()
            return self.pool.sample_on_each(prompts, params)
        except GivenUp:
            return {}

    def keep(self) -> None:
        self.pool.keep()

    def sleep(self) -> None:
        self.pool.sleep()

    def held(self) -> dict[str, Held]:
        return self.pool.held()

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        self.stop.check()
        return self.pool.use_costs(costs, work)

    def metrics(self) -> dict[str, float]:
        return self.pool.metrics()

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

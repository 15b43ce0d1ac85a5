"""A time limit for calls that know none."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

POLL_S = 0.2  # how often a waiting caller looks up
T = TypeVar("T")


def within(limit_s: float, while_waiting: Callable[[], None], call: Callable[[], T]) -> T:
    """What `call` returns or raises. After `limit_s` seconds TimeoutError is raised, and the call is left in its
    thread, which does not keep this process from ending. An exception of `while_waiting` ends the wait as well.

    >>> within(1.0, lambda: None, lambda: 6 * 7)
    42
    """
    answer = Future[T]()

    def act() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=act, daemon=True, name="within").start()
    deadline = time.monotonic() + limit_s
    while not wait([answer], POLL_S).done:
        while_waiting()
        if time.monotonic() > deadline:
            raise TimeoutError
    return answer.result()

"""OpenMP's threads wait for each other only briefly before they sleep.

libgomp, which comes with torch's wheels, lets a thread spin for milliseconds before it sleeps. That saves a wake-up if
every thread has a core of its own. Beside another busy process, however, the spinning thread takes the core that a
thread of the same region needs: a run with two threads on two cores became 15 times slower (docs/findings.md).
After a short spin the thread sleeps instead, and the system wakes it at once.
"""

from __future__ import annotations

import os
import sys

# Turns of libgomp's loop, about 25 µs: between regions that follow each other closely, threads stay awake. Of 500, 1000
# and 2000, 1000 is as fast alone as 2000, and at most 2.3 times slower beside a busy process. 500 is slower alone.
# LLVM's and Intel's runtimes (macOS, conda) wait 200 ms by default, and count in milliseconds.
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def waiting_variables() -> dict[str, str]:
    """Variables for a process that will load torch. There are none if the user has chosen how threads wait."""
    return {} if any(name in os.environ for name in CHOICES) else dict(WAITING)


def wait_briefly() -> None:
    """Sets them for this process and those that it starts. Nothing is changed if torch is loaded already, since the
    runtime has read its variables then."""
    if "torch" not in sys.modules:
        os.environ |= waiting_variables()

"""When the rewards of a group are the same, so that it teaches nothing. Nothing heavy is loaded here."""

from __future__ import annotations

import math
from collections.abc import Sequence

RELATIVE, ABSOLUTE = 1e-6, 1e-8  # how far apart rewards may be that are the same up to fp32 rounding


def tied(rewards: Sequence[float | None]) -> bool:
    """Tells whether there are fewer than two rewards, or all are equal up to fp32 rounding; None and NaN are none.

    Raises ValueError for an infinite one.

    >>> tied([0.1 + 0.2, 0.3, None]), tied([0.3, 0.3001])
    (True, False)
    """
    there = [reward for reward in rewards if reward is not None and not math.isnan(reward)]
    if any(map(math.isinf, there)):
        raise ValueError(f"a reward among {there} is infinite; return a finite number, or None to abstain")
    if len(there) < 2:
        return True
    low, high = min(there), max(there)
    return high - low <= ABSOLUTE + RELATIVE * max(abs(low), abs(high))

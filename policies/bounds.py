"""What a config.json may ask for: it is read before anything is built, since its numbers decide what that costs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20  # of a config.json; those of released models have at most a few hundred thousand
# By a pattern of a field's name, the most that it may be.
MOST = {
    r"num_nextn_predict_layers": 100,
    r"(\w+_)?(n?_?layers?|depth)": 1_000,
    r"(\w+_)?(experts?|heads?|groups?)": 100_000,
    r"num_labels": 100_000,
    r"(\w+_)?(size|dim|rank|embeddings)|n_embd|n_inner|n_positions|n_ctx|d_model|d_ff|d_inner": 2**31,
}


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises OSError, and ValueError for one that is too large, too deep, or no JSON."""
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes, and no model needs more than {MOST_BYTES:,}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
    return fields if isinstance(fields, dict) else {}


def beyond(fields: dict[str, Any]) -> Iterator[str]:
    """Yields a sentence for each number that no model has, also inside a field such as `text_config`.

    >>> list(beyond({"text_config": {"num_hidden_layers": 10**9}}))
    ['text_config.num_hidden_layers=1000000000 is more than 1,000, which no model has']
    """
    waiting: list[tuple[str, Any]] = [("", fields)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{name}" if place else name, entry) for name, entry in value.items()]
        elif isinstance(value, list):
            waiting += [(place, entry) for entry in value]
        elif isinstance(value, int | float):
            name = place.rpartition(".")[2]
            most = next((most for pattern, most in MOST.items() if re.fullmatch(pattern, name)), value)
            if value > most:
                yield f"{place:.100}={value} is more than {most:,}, which no model has"

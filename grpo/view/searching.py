"""The program that makes one search: the process of the page stays free, and may end it at any time.

It reads the search as JSON from its standard input, writes the rows that it finds as JSON, and imports nothing of ours,
so that it starts at once. A regular expression may need any time and any memory; this process has limits of both.
"""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import sys
from collections.abc import Mapping
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None  # type: ignore[assignment]

MEMORY = 2**30


def search(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`rows` of the query, or the `error` of a regular expression that is none."""
    database = sqlite3.connect(asked["path"], timeout=30)
    database.row_factory = sqlite3.Row
    # SQLite's own lower() knows ASCII alone.
    database.create_function("folded", 1, lambda text: (text or "").casefold(), deterministic=True)
    if regex := asked["regex"]:
        try:
            pattern = re.compile(regex)
        except (re.error, OverflowError) as error:
            return {"error": f"is no regular expression: {error}"}
        except (RecursionError, MemoryError):
            return {"error": "is too long, or has too many groups inside each other"}
        database.create_function("matches", 1, lambda text: bool(pattern.search(text or "")))
    return {"rows": [dict(row) for row in database.execute(asked["query"], asked["values"])]}


def main() -> None:
    asked = json.load(sys.stdin)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if hasattr(signal, "setitimer"):  # whoever started it may be killed meanwhile
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"] + 1)
    json.dump(search(asked), sys.stdout)


if __name__ == "__main__":
    main()

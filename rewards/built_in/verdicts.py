"""What a judge has said, by the digest of what it was asked, and the tokens that it took."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

_TABLES = """
create table if not exists verdicts (digest text primary key, score real not null, reason text not null);
create table if not exists spent (account text primary key, tokens integer not null);
"""
_memory: list[Verdicts] = []  # the one of this process


class Verdict(NamedTuple):
    score: float
    reason: str


class Verdicts:
    """The verdicts in a SQLite file that several processes may use, or in the memory of this one."""

    def __init__(self, path: str) -> None:
        self._database = sqlite3.connect(path, timeout=60.0, check_same_thread=False)
        self._database.executescript(_TABLES)

    @classmethod
    @contextmanager
    def open(cls, path: str | None) -> Iterator[Verdicts]:
        """Opens the file `path`, or the memory without one. Raises ValueError for a file that is no such cache or
        cannot be written."""
        if path is None:
            _memory[:] = _memory or [cls(":memory:")]
            yield _memory[0]
            return
        verdicts = None
        try:
            verdicts = cls(path)
            yield verdicts
        except sqlite3.Error as error:
            raise ValueError(f"cache={path!r} cannot be used as the cache of a judge: {error}; name another") from error
        finally:
            if verdicts:
                verdicts._database.close()

    def find(self, digests: Sequence[str]) -> dict[str, Verdict]:
        """The verdicts that there are, by digest."""
        query = "select score, reason from verdicts where digest = ?"
        rows = {digest: self._database.execute(query, (digest,)).fetchone() for digest in digests}
        return {digest: Verdict(*row) for digest, row in rows.items() if row}

    def keep_verdicts(self, verdicts: Mapping[str, Verdict], account: str, tokens: int) -> None:
        """Keeps verdicts and what they took together: no verdict is there whose tokens are not accounted for."""
        with self._database:
            rows = [(digest, *verdict) for digest, verdict in verdicts.items()]
            self._database.executemany("insert or ignore into verdicts values (?, ?, ?)", rows)
            self._database.execute(
                "insert into spent values (?, ?) on conflict (account) do update set tokens = tokens + excluded.tokens",
                (account, tokens),
            )

    def spent(self, account: str) -> int:
        row = self._database.execute("select tokens from spent where account = ?", (account,)).fetchone()
        return row[0] if row else 0

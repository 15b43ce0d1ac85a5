"""A database in the user's cache, which the pages "search" and "data" ask about all completions of a run.

It is built once, step by step while the page is open, and only new or changed records are read after that. It is not in
the run folder: whoever made that folder could put a link to another database there, or a database of his own.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from grpo.view import searching
from grpo.view.reading import read_step
from rewards.records import recorded_steps, rollout_path

FOUND_AT_MOST, TEXT_AT_MOST = 200, 100_000
KEPT_S = 30 * 86_400  # an index that no page has opened for so long is removed
EASIER = "ask for fewer steps, or for a simpler expression"
SEARCH_S, SEARCHES = 10.0, 4  # how long a search may take, and how many may go on at once
TABLES = """
create table if not exists records (step integer primary key, size integer, changed integer, fault text);
create table if not exists completions (
  step integer, number integer, sample integer, prompt_id text, reward real, mark real, length integer, reason text,
  text text);
create index if not exists of_step on completions (step);
create index if not exists of_prompt on completions (prompt_id, step);
create table if not exists prompts (prompt_id text primary key, text text);
"""
BOUNDS = {"low": "reward >= ?", "high": "reward <= ?", "first": "step >= ?", "last": "step <= ?"}
CLAUSES = BOUNDS | {
    "prompt": "completions.prompt_id = ?",
    "reason": "completions.reason = ?",
    "text": "(instr(folded(completions.text), folded(?)) or instr(folded(prompts.text), folded(?)))",
    "regex": "(matches(completions.text) or matches(prompts.text))",
}
WITHOUT_COMPLETION = (
    "delete from prompts where not exists (select 1 from completions where completions.prompt_id = prompts.prompt_id)"
)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet/view"


class Index:
    """Indexes the completions of one run folder. Where the cache cannot be written, the database is a temporary
    file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._writing, self._free = folder, threading.Lock(), threading.BoundedSemaphore(SEARCHES)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._searches: set[subprocess.Popen[str]] = set()
        self._fault: str | None = None
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32] + ".sqlite"
        try:
            cache = cache_folder()
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_old(cache)
            self._make(cache / name)
            os.utime(self.path)
        except (OSError, RuntimeError, sqlite3.Error):  # no home, a full disk, or a file that is no database
            self._temporary = tempfile.TemporaryDirectory(prefix="quartet-view-")
            self._make(Path(self._temporary.name) / name)

    def _make(self, path: Path) -> None:
        self.path = path
        with self._open() as database:
            database.execute("pragma journal_mode=wal")
            database.executescript(TABLES)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.row_factory = sqlite3.Row
            yield database

    def keep_up(self, stop: threading.Event) -> None:
        """Update the index; a full disk is a fault that the page shows."""
        try:
            self.update(stop)
            self._fault = None
        except (OSError, sqlite3.Error) as error:
            self._fault = f"the index {self.path} cannot be written: {error}"

    def update(self, stop: threading.Event) -> int:
        """Read the records that are new or have changed, newest first, and forget those that are gone. Returns how many
        were read. Ends after the record at hand where `stop` is set."""
        read = 0
        with self._writing, self._open() as database:
            known = {row["step"]: (row["size"], row["changed"]) for row in database.execute("select * from records")}
            there = recorded_steps(self.folder)
            lost = known.keys() - set(there)
            for step in lost:
                self._forget(database, step)
            for step in reversed(there):
                if stop.is_set():
                    break
                try:
                    status = rollout_path(self.folder, step).stat()
                except FileNotFoundError:
                    continue  # the run has taken it back
                mark = status.st_size, status.st_mtime_ns
                if known.get(step) != mark:
                    self._read(database, step, mark)
                    database.commit()
                    read += 1
            if read or lost:  # another run may be in this folder now
                database.execute(WITHOUT_COMPLETION)
        return read

    def _forget(self, database: sqlite3.Connection, step: int) -> None:
        database.execute("delete from completions where step = ?", (step,))
        database.execute("delete from records where step = ?", (step,))

    def _read(self, database: sqlite3.Connection, step: int, mark: tuple[int, int]) -> None:
        self._forget(database, step)
        fault = None
        try:
            self._insert(database, step, read_step(self.folder, step))
        except (OSError, ValueError, OverflowError, MemoryError, sqlite3.ProgrammingError) as error:
            self._forget(database, step)
            fault = _storable(f"the record of step {step} is not in the index: {error}")
        database.execute("insert into records values (?,?,?,?)", (step, *mark, fault))

    def _insert(self, database: sqlite3.Connection, step: int, lines: list[dict[str, Any]]) -> None:
        number, rows, prompts = -1, [], {}
        for line in lines:
            number += line["sample"] == 0
            prompt_id = _storable(line["prompt_id"])
            prompts[prompt_id] = _storable(line["prompt"][:TEXT_AT_MOST])
            place = step, max(number, 0), line["sample"], prompt_id
            marks = line.get("reward"), next(iter(line["parts"].values()), None)
            end = len(line["token_ids"]), line.get("finish_reason"), _storable(line["text"][:TEXT_AT_MOST])
            rows.append((*place, *marks, *end))
        database.executemany("insert into completions values (?,?,?,?,?,?,?,?,?)", rows)
        database.executemany("insert or replace into prompts values (?,?)", prompts.items())

    def state(self) -> dict[str, Any]:
        """Returns how many of the recorded steps are in the index, and the faults of those that could not be read."""
        with self._open() as database:
            count = database.execute("select count(*) from records").fetchone()[0]
            faults = [row["fault"] for row in database.execute("select fault from records where fault is not null")]
        faults += [self._fault] if self._fault else []
        return {"indexed": count, "recorded": len(recorded_steps(self.folder)), "faults": faults}

    def search(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """Returns completions, newest first: `text` or `regex` in them or their prompts, `low` and `high` bounds of the
        reward, `first` and `last` step, `prompt` id, `reason` of their end. Raises ValueError for a bound that is no
        number and for a regular expression that is none."""
        clauses, values, regex = ["1"], list[Any](), asked.get("regex")
        for name, clause in CLAUSES.items():
            value = asked.get(name)
            if not value:
                continue
            clauses.append(clause)
            try:
                values += [float(value) if name in BOUNDS else value] * clause.count("?")
            except ValueError as error:
                raise ValueError(f"{name}={value!r} is no number") from error
        query = (
            "select step, number, sample, completions.prompt_id, reward, length, reason, "
            "substr(completions.text, 1, 400) as text, substr(prompts.text, 1, 200) as prompt "
            "from completions left join prompts using (prompt_id) "
            f"where {' and '.join(clauses)} order by step desc, number, sample limit {FOUND_AT_MOST + 1}"
        )
        rows = self._rows(query, values, regex)
        return {"found": rows[:FOUND_AT_MOST], "more": len(rows) > FOUND_AT_MOST}

    def _rows(self, query: str, values: list[Any], regex: str | None) -> list[dict[str, Any]]:
        """Returns what a process of its own finds, which is ended after SEARCH_S seconds and when the page ends."""
        if not self._free.acquire(blocking=False):
            raise ValueError(f"{SEARCHES} searches of this run are going on; wait until one has ended")
        request = {"path": str(self.path), "query": query, "values": values, "regex": regex, "seconds": SEARCH_S}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            with subprocess.Popen([sys.executable, "-I", searching.__file__], **pipes, text=True) as process:
                self._searches.add(process)
                try:
                    text = process.communicate(json.dumps(request), SEARCH_S)[0]
                finally:
                    process.kill()
                    self._searches.discard(process)
            answer = json.loads(text)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"the search took more than {SEARCH_S:g} s; {EASIER}") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"the search has ended without an answer, perhaps for want of memory; {EASIER}") from error
        finally:
            self._free.release()
        if "error" in answer:
            raise ValueError(f"regex={regex!r:.100} {answer['error']}")
        return list(answer["rows"])

    def prompts(self) -> list[dict[str, Any]]:
        """Returns every prompt with its number of completions, the share of them with full marks (a first reward of 1
        or more) over all and step by step, and how many other prompts have the same text."""
        with self._open() as database:
            rows = database.execute(
                "select prompt_id, step, count(*) as n, sum(mark >= 1) as right, avg(reward) as reward "
                "from completions group by prompt_id, step order by prompt_id, step"
            ).fetchall()
            texts = {row["prompt_id"]: row["text"] for row in database.execute("select * from prompts")}
        same, prompts = Counter(texts.values()), []
        for prompt_id, of_prompt in groupby(rows, key=itemgetter("prompt_id")):
            text, steps = texts.get(prompt_id, ""), list(of_prompt)
            entry = {"prompt_id": prompt_id, "prompt": text[:200], "same": max(same[text], 1) - 1}
            entry |= {"n": sum(row["n"] for row in steps), "right": sum(row["right"] or 0 for row in steps)}
            entry |= {"steps": [row["step"] for row in steps]}
            prompts.append(entry | {"rates": [(row["right"] or 0) / row["n"] for row in steps]})
        return prompts

    def places(self, prompt_id: str) -> list[dict[str, Any]]:
        """Returns the step and the number of the group wherever this prompt was drawn, ascending."""
        with self._open() as database:
            rows = database.execute(
                "select distinct step, number from completions where prompt_id = ? order by step, number", (prompt_id,)
            )
            return [dict(row) for row in rows]

    def close(self) -> None:
        for process in list(self._searches):
            process.kill()
        if self._temporary is not None:
            self._temporary.cleanup()


def _remove_old(cache: Path) -> None:
    for path in cache.glob("*.sqlite*"):
        with suppress(FileNotFoundError):  # of another page, which has just ended
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _storable(text: str) -> str:
    """Replace lone surrogates, which SQLite refuses."""
    return text.encode("utf-8", "replace").decode()

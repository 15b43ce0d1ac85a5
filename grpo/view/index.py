"""What the pages "search" and "data" ask of all completions of a run: a database beside the run's records.

It is built once, step by step while the page is open, and only new or changed records are read after that.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from grpo.run.records import read_rollouts, recorded_steps, rollout_path

FILE, FOUND_AT_MOST, TEXT_AT_MOST = "view.sqlite", 200, 100_000
TABLES = """
create table if not exists records (step integer primary key, size integer, changed integer, fault text);
create table if not exists completions (
  step integer, number integer, sample integer, prompt_id text, reward real, mark real, length integer, reason text,
  text text);
create index if not exists of_step on completions (step);
create index if not exists of_prompt on completions (prompt_id, step);
create table if not exists prompts (prompt_id text primary key, text text);
"""


class Index:
    """The completions of one run folder. Where the folder cannot be written, the database is a temporary file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._writing = folder, threading.Lock()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._make(folder / FILE)
        except sqlite3.Error:  # a folder that cannot be written, or a file that is no database of ours
            self._temporary = tempfile.TemporaryDirectory(prefix="quartet-view-")
            self._make(Path(self._temporary.name) / FILE)

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

    def update(self, stop: threading.Event) -> int:
        """Read the records that are new or have changed, newest first; forget those that are gone. How many were read.
        Ends after the record at hand where `stop` is set."""
        read = 0
        with self._writing, self._open() as database:
            known = {row["step"]: (row["size"], row["changed"]) for row in database.execute("select * from records")}
            there = recorded_steps(self.folder)
            for step in known.keys() - set(there):
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
        return read

    def _forget(self, database: sqlite3.Connection, step: int) -> None:
        database.execute("delete from completions where step = ?", (step,))
        database.execute("delete from records where step = ?", (step,))

    def _read(self, database: sqlite3.Connection, step: int, mark: tuple[int, int]) -> None:
        self._forget(database, step)
        try:
            lines, fault = read_rollouts(self.folder, step), None
        except (OSError, ValueError) as error:
            lines, fault = [], str(error)
        number, rows, prompts = -1, [], {}
        for line in lines:
            number += line["sample"] == 0
            prompts[line["prompt_id"]] = line["prompt"]
            place = step, max(number, 0), line["sample"], line["prompt_id"]
            marks = line.get("reward"), next(iter(line["parts"].values()), None)
            end = len(line["token_ids"]), line.get("finish_reason"), _storable(line["text"][:TEXT_AT_MOST])
            rows.append((*place, *marks, *end))
        database.executemany("insert into completions values (?,?,?,?,?,?,?,?,?)", rows)
        texts = [(key, _storable(text)) for key, text in prompts.items()]
        database.executemany("insert or ignore into prompts values (?,?)", texts)
        database.execute("insert into records values (?,?,?,?)", (step, *mark, fault))

    def state(self) -> dict[str, Any]:
        """How many of the recorded steps are in the index, and the faults of those that could not be read."""
        with self._open() as database:
            count = database.execute("select count(*) from records").fetchone()[0]
            faults = [row["fault"] for row in database.execute("select fault from records where fault is not null")]
        return {"indexed": count, "recorded": len(recorded_steps(self.folder)), "faults": faults}

    def search(self, wanted: Mapping[str, str]) -> dict[str, Any]:
        """Completions, newest first: `text` or `regex` in them or their prompts, `low` and `high` bounds of the reward,
        `first` and `last` step, `prompt` id, `reason` of their end.

        Raises ValueError for a bound that is no number and for a regular expression that is none.
        """
        clauses, values = ["1"], list[Any]()
        bounds = {"low": "reward >= ?", "high": "reward <= ?", "first": "step >= ?", "last": "step <= ?"}
        for name, clause in bounds.items():
            if given := wanted.get(name):
                try:
                    values.append(float(given))
                except ValueError as error:
                    raise ValueError(f"{name}={given!r} is no number") from error
                clauses.append(clause)
        for name, column in {"prompt": "prompt_id", "reason": "reason"}.items():
            if given := wanted.get(name):
                clauses.append(f"completions.{column} = ?")
                values.append(given)
        if text := wanted.get("text"):
            clauses.append("(instr(lower(completions.text), lower(?)) or instr(lower(prompts.text), lower(?)))")
            values += [text, text]
        with self._open() as database:
            if regex := wanted.get("regex"):
                try:
                    pattern = re.compile(regex)
                except re.error as error:
                    raise ValueError(f"regex={regex!r} is no regular expression: {error}") from error
                database.create_function("matches", 1, lambda text: bool(pattern.search(text or "")))
                clauses.append("(matches(completions.text) or matches(prompts.text))")
            rows = database.execute(
                "select step, number, sample, completions.prompt_id, reward, length, reason, "
                "substr(completions.text, 1, 400) as text, substr(prompts.text, 1, 200) as prompt "
                "from completions left join prompts using (prompt_id) "
                f"where {' and '.join(clauses)} order by step desc, number, sample limit {FOUND_AT_MOST + 1}",
                values,
            ).fetchall()
        return {"found": [dict(row) for row in rows[:FOUND_AT_MOST]], "more": len(rows) > FOUND_AT_MOST}

    def prompts(self) -> list[dict[str, Any]]:
        """Every prompt with its number of completions, the share of them with full marks (a first reward of 1 or more)
        over all and step by step, and how many other prompts have the same text."""
        with self._open() as database:
            rows = database.execute(
                "select prompt_id, step, count(*) as n, sum(mark >= 1) as right, avg(reward) as reward "
                "from completions group by prompt_id, step order by prompt_id, step"
            ).fetchall()
            texts = {row["prompt_id"]: row["text"] for row in database.execute("select * from prompts")}
        same: dict[str, int] = {}
        for text in texts.values():
            same[text] = same.get(text, 0) + 1
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            text = texts.get(row["prompt_id"], "")
            entry = found.setdefault(
                row["prompt_id"],
                {"prompt_id": row["prompt_id"], "prompt": text[:200], "n": 0, "right": 0, "same": same.get(text, 1) - 1}
                | {"steps": [], "rates": []},
            )
            entry["n"] += row["n"]
            entry["right"] += row["right"] or 0
            entry["steps"].append(row["step"])
            entry["rates"].append((row["right"] or 0) / row["n"])
        return list(found.values())

    def places(self, prompt_id: str) -> list[dict[str, Any]]:
        """Where this prompt was drawn: step and number of the group, ascending."""
        with self._open() as database:
            rows = database.execute(
                "select distinct step, number from completions where prompt_id = ? order by step, number", (prompt_id,)
            )
            return [dict(row) for row in rows]

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()


def _storable(text: str) -> str:
    """Without lone surrogates, which SQLite refuses."""
    return text.encode("utf-8", "replace").decode()

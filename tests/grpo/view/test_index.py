"""The database that search and the page of prompts ask."""

import json
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import zstandard

from grpo.view.index import KEPT_S, SEARCHES, Index, cache_folder
from rewards.records import read_rollouts, rollout_path

CASE = Path(__file__).parents[2] / "cases/run_to_view"
GO_ON = threading.Event()


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CASE, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def index(folder):
    index = Index(folder)
    index.update(GO_ON)
    return index


def _write(folder: Path, step: int, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    rollout_path(folder, step).write_bytes(zstandard.ZstdCompressor().compress(text.encode()))


def test_a_search_finds_what_a_scan_finds(index, folder):
    lines = [(step, line) for step in (4, 3, 2, 1) for line in read_rollouts(folder, step)]

    def scan(wanted) -> list[tuple[int, int, str]]:
        return [(step, line["sample"], line["text"][:400]) for step, line in lines if wanted(step, line)]

    def found(**wanted: str) -> list[tuple[int, int, str]]:
        return [(row["step"], row["sample"], row["text"]) for row in index.search(wanted)["found"]]

    word = lines[0][1]["text"].split()[0]
    assert found() == scan(lambda *_: True)
    for text in (word, word.upper()):
        expected = scan(lambda _, x: word.lower() in x["text"].lower() or word.lower() in x["prompt"].lower())
        assert found(text=text) == expected != []
    assert found(regex=r"#### \d\d$") == scan(lambda _, x: x["text"][-7:-2] == "#### " and x["text"][-2:].isdigit())
    assert found(low="0.5") == scan(lambda _, x: x["reward"] >= 0.5) != []
    assert found(high="0.5", first="2", last="3") == scan(lambda step, x: x["reward"] <= 0.5 and step in (2, 3)) != []
    assert found(prompt=lines[5][1]["prompt_id"], reason="stop") != []
    assert found(text="no completion says this") == []


def test_no_more_than_the_first_of_many_are_found(index, monkeypatch):
    monkeypatch.setattr("grpo.view.index.FOUND_AT_MOST", 3)
    found = index.search({})
    assert len(found["found"]) == 3
    assert found["more"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "("}, "regex='\\('"),
        ({"regex": "a{99999999999}"}, "is no regular expression: the repetition number is too large"),
        ({"regex": "(" * 2000 + ")" * 2000}, "too many groups inside each other"),
        ({"low": "much"}, "low='much' is no"),
    ],
)
def test_a_question_that_cannot_be_asked_is_an_error(index, wanted, message):
    with pytest.raises(ValueError, match=message):
        index.search(wanted)


def test_only_what_is_new_or_has_changed_is_read(index, folder):
    assert index.update(GO_ON) == 0
    lines = read_rollouts(folder, 2)
    lines[0]["text"] = "written again after learning"
    _write(folder, 2, lines)
    assert index.update(GO_ON) == 1
    assert [row["step"] for row in index.search({"text": "again after learning"})["found"]] == [2]
    rollout_path(folder, 4).unlink()  # a resumed run takes back what came after its checkpoint
    assert index.update(GO_ON) == 0
    assert index.search({"first": "4"})["found"] == []
    assert Index(folder).update(GO_ON) == 0  # another process finds it built


def test_an_index_that_is_stopped_goes_on_later(folder):
    index, stop = Index(folder), threading.Event()
    stop.set()
    assert index.update(stop) == 0
    assert index.state() == {"indexed": 0, "recorded": 4, "faults": []}
    assert index.update(GO_ON) == 4


def test_a_damaged_record_is_said_and_the_others_are_there(folder):
    rollout_path(folder, 3).write_bytes(b"no zstandard")
    index = Index(folder)
    index.update(GO_ON)
    assert "step_000003.jsonl.zst is damaged" in index.state()["faults"][0]
    assert {row["step"] for row in index.search({})["found"]} == {1, 2, 4}


def test_lone_surrogates_can_be_kept(folder):
    lines = read_rollouts(folder, 1)
    lines[0]["text"] = "half \ud800 a character"
    _write(folder, 1, lines)
    index = Index(folder)
    index.update(GO_ON)
    assert index.search({"text": "half"})["found"][0]["text"] == "half ? a character"


def test_prompts_have_their_pass_rates(folder):
    lines = read_rollouts(folder, 1)[:4]
    for line, mark in zip(lines, (1.0, 0.0, 1.0, None), strict=True):
        line["prompt_id"], line["parts"] = "p", {"gsm8k": mark}
    _write(folder, 1, lines)
    for line in lines:
        line["parts"], line["prompt_id"] = {"gsm8k": 1.0}, "p"
    _write(folder, 2, lines)
    for step in (3, 4):
        rollout_path(folder, step).unlink()
    index = Index(folder)
    index.update(GO_ON)
    (row,) = index.prompts()
    assert (row["n"], row["right"], row["steps"], row["rates"], row["same"]) == (8, 6, [1, 2], [0.5, 1.0], 0)
    assert index.places("p") == [{"step": 1, "number": 0}, {"step": 2, "number": 0}]


def test_another_run_in_the_same_folder_has_its_own_prompts(index, folder):
    for step in (1, 2, 3, 4):
        lines = read_rollouts(folder, step)
        for line in lines:
            line["prompt"] = f"of another run {line['prompt_id']}"
        _write(folder, step, lines if step > 1 else lines[:4])
    index.update(GO_ON)
    assert {row["prompt"][:14] for row in index.search({})["found"]} == {"of another run"}
    assert {row["same"] for row in index.prompts()} == {0}


def test_capitals_do_not_matter_in_any_language(folder):
    lines = read_rollouts(folder, 1)
    lines[0]["text"] = "Привет, ÉTÉ"
    _write(folder, 1, lines)
    index = Index(folder)
    index.update(GO_ON)
    assert [row["step"] for row in index.search({"text": "привет, été"})["found"]] == [1]


SLOW = {"regex": "(a|aa)+$", "text": "a"}


@pytest.fixture
def slow(index, folder):
    """An index in which the search for SLOW takes years."""
    lines = read_rollouts(folder, 4)
    lines[0]["text"] = "a" * 100 + "b"
    _write(folder, 4, lines)
    index.update(GO_ON)
    return index


def test_a_search_that_takes_too_long_is_ended(slow, monkeypatch):
    monkeypatch.setattr("grpo.view.index.SEARCH_S", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"the search took more than 0.5 s; ask for fewer steps"):
        slow.search(SLOW)
    assert time.monotonic() - began < 10
    assert slow.search({"regex": "a+b"})["found"]


def test_no_more_than_a_few_searches_go_on_and_all_end_with_the_page(slow):
    failures: list[str] = []

    def search() -> None:
        with pytest.raises(ValueError, match="search") as failure:
            slow.search(SLOW)
        failures.append(str(failure.value))

    threads = [threading.Thread(target=search) for _ in range(SEARCHES + 1)]
    for thread in threads:
        thread.start()
    while len(slow._searches) < SEARCHES or not failures:
        time.sleep(0.01)
    slow.close()
    for thread in threads:
        thread.join(8)
    assert "4 searches of this run are going on" in failures[0]
    assert ["ended without an answer" in failure for failure in failures[1:]] == [True] * SEARCHES


@pytest.mark.parametrize(
    "wrong", [{"finish_reason": {}}, {"sample": 10**30}, {"reward": 10**300}, {"finish_reason": "\ud800"}]
)
def test_a_record_that_no_run_writes_is_said_and_stops_nothing(folder, wrong):
    _write(folder, 4, [line | wrong for line in read_rollouts(folder, 4)])
    index = Index(folder)
    assert index.update(GO_ON) == 4
    assert "the record of step 4 is not in the index" in index.state()["faults"][0]
    assert {row["step"] for row in index.search({})["found"]} == {1, 2, 3}
    assert index.update(GO_ON) == 0


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_link_in_the_folder_leads_to_no_other_database(tmp_path, folder, kind):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("create table precious (number integer)")
    database.close()
    before, link = other.read_bytes(), folder / "view.sqlite"
    link.symlink_to(other) if kind == "link" else link.hardlink_to(other)
    there = set(folder.rglob("*"))
    assert Index(folder).update(GO_ON) == 4
    assert other.read_bytes() == before
    assert set(folder.rglob("*")) == there


def test_the_cache_is_of_its_owner_alone_and_forgets_what_nobody_opens(index, folder):
    assert index.path.parent == cache_folder()
    assert cache_folder().stat().st_mode & 0o077 == 0
    old = cache_folder() / "old.sqlite"
    old.touch()
    os.utime(old, (time.time() - 2 * KEPT_S,) * 2)
    assert Index(folder).path == index.path
    assert not old.exists()


def test_where_there_is_no_cache_the_index_is_temporary(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "config.yaml"))  # a file, not a folder
    index = Index(folder)
    assert index.update(GO_ON) == 4
    index.close()
    assert not index.path.exists()


def test_an_index_that_is_no_database_is_left_alone(folder, index):
    kept = index.path
    kept.write_text("something else")
    index = Index(folder)
    assert index.update(GO_ON) == 4
    assert kept.read_text() == "something else"
    index.close()
    assert not index.path.exists()

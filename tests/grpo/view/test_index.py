"""The database that search and the page of prompts ask."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import zstandard

from grpo.run.records import read_rollouts, rollout_path
from grpo.view.index import FILE, Index

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
    ("wanted", "message"), [({"regex": "("}, "regex='\\('"), ({"low": "much"}, "low='much' is no")]
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_has_its_index_elsewhere(folder):
    folder.chmod(0o500)
    try:
        index = Index(folder)
        assert index.update(GO_ON) == 4
        assert not (folder / FILE).exists()
        index.close()
    finally:
        folder.chmod(0o700)


def test_a_file_that_is_no_index_is_left_alone(folder):
    (folder / FILE).write_text("something else")
    index = Index(folder)
    assert index.update(GO_ON) == 4
    assert (folder / FILE).read_text() == "something else"
    index.close()
    assert not index.path.exists()

"""What the page of a run is told, over a recorded run of four steps with four groups of four, and over folders that a
stranger has made to hurt."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer

from grpo.cli.parse import main
from review.page.run_files import RunFiles, finite
from review.page.tokens import find_tokenizer, token_texts
from review.readers.machine import caption
from review.readers.plain_files import check_files, read_step
from review.readers.run_folder import read_metrics
from review.statistics.estimates import wilson_interval
from rewards.records import read_rollouts, rollout_path, split_groups

CASE = Path(__file__).parents[2] / "cases/run_to_view"


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
SEARCHES = {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}


@pytest.fixture
def run():
    return RunFiles(CASE)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(CASE, tmp_path / "run"))


def test_the_overview_has_every_metric_with_its_meaning_and_intervals(run):
    found = run.overview()
    measured = read_metrics(CASE)
    assert [row["step"] for row in found["rows"]] == [0, 1, 2, 3, 4]
    for row, expected in zip(found["rows"], measured, strict=True):
        assert row.items() >= expected.items()
    first = found["rows"][0]
    bounds = wilson_interval(first["eval/accuracy"] * 16, 16)
    assert (first["eval/accuracy/low"], first["eval/accuracy/high"]) == bounds
    assert "eval/accuracy/low" not in found["rows"][1]
    assert "scores" in found["meanings"]["reward/std"]
    assert all(found["meanings"].values())
    assert found["recorded"] == [1, 2, 3, 4]
    assert found["ended"]["how"] == "finished"
    assert found["machine"] == caption(json.loads((CASE / "environment.json").read_text()))
    assert "on 16 problems. The difference is" in found["headline"][0]
    assert [row["step"] for row in run.overview(after=3)["rows"]] == [3, 4]


def test_two_pages_that_ask_for_two_steps_at_once_get_their_own(run):
    """The server answers in threads, and the last step is kept for both."""
    expected = RunFiles(CASE).step(2)
    assert run.step(2) == expected

    class Between(tuple):
        """The step that is kept, until somebody has looked at it."""

        def __getitem__(self, part):
            found = super().__getitem__(part)
            if isinstance(part, slice):
                run._step = None
                run.step(3)
            return found

    run._step = Between(run._step)
    assert run.step(2) == expected


def test_a_step_is_its_groups(run):
    lines, found = read_rollouts(CASE, 2), run.step(2)
    assert len(found["groups"]) == 4
    assert [r for group in found["groups"] for r in group["rewards"]] == [line["reward"] for line in lines]
    assert [n for group in found["groups"] for n in group["lengths"]] == [len(line["token_ids"]) for line in lines]
    assert [group["tied"] for group in found["groups"]] == [len(set(g["rewards"])) == 1 for g in found["groups"]]


def test_a_prompt_is_found_wherever_it_was_drawn(folder, monkeypatch):
    """Also one whose id JSON escapes. A record that cannot be read is left out. Of many steps the newest are shown."""
    run, name = RunFiles(folder), 'drawn "twice" é\n'
    for step, changed in ((1, 2), (3, 0), (4, 3)):
        groups = split_groups(read_rollouts(CASE, step))
        lines = [
            line | ({"prompt_id": name} if g == changed else {}) for g, group in enumerate(groups) for line in group
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        rollout_path(run.folder, step).write_bytes(zstandard.compress(text.encode()))
    expected = [{"step": 1, "number": 2}, {"step": 3, "number": 0}, {"step": 4, "number": 3}]
    assert run.places(name) == expected
    rollout_path(run.folder, 3).write_bytes(b"no record")
    assert run.places(name) == [expected[0], expected[2]]
    assert run.places("never drawn") == []
    monkeypatch.setattr("review.page.run_files.PLACES_AT_MOST", 1)
    assert run.places(name) == expected[2:]


def test_an_accuracy_of_nobody_knows_how_many_problems_has_no_interval(folder):
    first, *others = (json.loads(line) for line in (CASE / "metrics.jsonl").read_text().splitlines())
    rows = [first | {"eval/unscored": 3}, *others]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = RunFiles(folder).overview()["rows"]
    assert "eval/accuracy" in found[0]
    assert "eval/accuracy/low" not in found[0]
    assert "eval/accuracy/low" in found[-1]


def test_a_step_shows_the_rewards_that_failed_in_it(folder):
    failure = {"function": "f", "prompt_id": "p", "sample_index": 1, "kind": "raised", "message": "boom"}
    events = [
        {"event": "reward_error", "step": 2, **failure},
        {"event": "reward_error", "step": 2, "evaluation": "greedy", **failure},
        {"event": "reward_error", "step": 3, **failure},
        {"event": "non_finite", "step": 2, "error": "inf"},
    ]
    with open(folder / "events.jsonl", "a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))
    said = [event["error"] for event in RunFiles(folder).step(2)["failures"]]
    assert said == ["reward 'f' failed on prompt 'p', sample 1: raised: boom", "inf"]


def test_the_tokens_of_a_completion_make_its_text(run):
    tokenizer = Tokenizer.from_file(str(CASE / "warm_start/tokenizer.json"))
    for line, completion in zip(read_rollouts(CASE, 3)[4:8], run.group(3, 1)["completions"], strict=True):
        assert len(completion["tokens"]) == len(line["token_ids"]) == len(completion["logprobs"])
        assert "".join(completion["tokens"]) == tokenizer.decode(line["token_ids"], skip_special_tokens=False)
        assert completion["logprobs"] == line["logprobs"]


def test_a_report_of_damaged_files_has_no_traceback(folder):
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (folder / "warm_start/tokenizer.json").write_text("")  # tokens are numbers then
    assert main(["report", str(folder)]) == 0


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no rollouts of step 9.*there are steps 1 to 4"):
        run.step(9)
    with pytest.raises(IndexError, match="groups 0 to 3, and none with the number 4"):
        run.group(1, 4)
    with pytest.raises(ValueError, match="no such folder"):
        RunFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no run folder \(no metrics.jsonl in it\)"):
        RunFiles(tmp_path)


def test_lists_that_do_not_fit_the_tokens_are_left_out(run):
    line = {"token_ids": [5, 6], "logprobs": [0.0], "draft": {"depths": [1, 2, 3]}}
    completion = run._completion(line)
    assert completion["logprobs"] is completion["depths"] is completion["policy_logprobs"] is None
    assert run._completion(line | {"draft": [1, 2]})["depths"] is None


def test_a_group_begins_with_its_sample_0_and_numbers_that_json_does_not_know_become_null():
    assert [len(group) for group in split_groups([{"sample": n} for n in (0, 1, 0, 0, 1, 2)])] == [2, 1, 3]
    assert finite({"a": [float("nan"), (1.5, float("inf"))]}) == {"a": [None, [1.5, None]]}


def test_pipes_and_devices_are_not_read(folder):
    """Reading one would wait for a writer for ever, or never end."""
    rollout_path(folder, 1).unlink()
    rollout_path(folder, 1).symlink_to("/dev/zero")
    for path in (rollout_path(folder, 2), folder / "events.jsonl", folder / "config.yaml"):
        path.unlink()
        os.mkfifo(path)
    run = RunFiles(folder)
    for ask in (lambda: run.step(1), lambda: run.step(2), run.overview, run.events):
        with pytest.raises(ValueError, match="is no plain file, so it is not read"):
            ask()
    check_files(folder / "nothing")  # files that are not there pass


def test_a_large_file_is_not_read(folder, monkeypatch):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(ValueError, match=r"metrics.jsonl has 512 MiB; the page reads 512 at most"):
        RunFiles(folder).overview()
    monkeypatch.setattr("review.readers.plain_files.MOST_BYTES", 100_000)
    rollout_path(folder, 2).write_bytes(zstandard.ZstdCompressor().compress(b" " * 2**20))
    assert rollout_path(folder, 2).stat().st_size < 100
    with pytest.raises(ValueError, match="would unpack to 1 MiB; the page reads 0 at most"):
        read_step(folder, 2)


def _write_tokenizer(folder: Path, decoder: object) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "▁b": 1}, "unk_token": "a"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    written = json.loads(tokenizer.to_str()) | {"decoder": decoder}
    (folder / "tokenizer.json").write_text(json.dumps(written))


def test_bytes_that_are_no_character_take_no_time():
    tokenizer = find_tokenizer(CASE)
    half = next(i for i in range(300) if tokenizer.decode([i]) == "�")
    began = time.process_time()
    texts = token_texts(tokenizer, [half] * 20_000)
    assert time.process_time() - began < 5  # all bytes so far decoded again for every token: two minutes
    assert set(texts) == {"", "�" * 8}
    whole = Tokenizer.from_file(str(CASE / "warm_start/tokenizer.json")).encode("née 😀!").ids
    assert "".join(token_texts(tokenizer, [half] * 8 + whole)) == "�" * 8 + "née 😀!"


@pytest.mark.parametrize("decoder", [GROWS, {"type": "Sequence", "decoders": [SEARCHES]}, {"type": "Replace"}])
def test_a_decoder_that_could_take_any_time_or_memory_is_not_used(tmp_path, decoder):
    _write_tokenizer(tmp_path, decoder)
    assert find_tokenizer(tmp_path) is None
    assert token_texts(None, [3, 1]) == ["3 ", "1 "]


def test_a_decoder_of_sentencepiece_is_used(tmp_path):
    _write_tokenizer(
        tmp_path, {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]}
    )
    assert token_texts(find_tokenizer(tmp_path), [0, 1]) == ["a", " b"]


def test_a_long_text_ends_in_numbers(monkeypatch):
    monkeypatch.setattr("review.page.tokens.TEXT_AT_MOST", 3)
    tokenizer = find_tokenizer(CASE)
    first, *_, last = token_texts(tokenizer, [tokenizer.token_to_id("a")] * 6)
    assert (first, last[0]) == ("a", "<")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert find_tokenizer(tmp_path) is None

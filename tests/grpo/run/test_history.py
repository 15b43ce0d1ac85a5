"""Earlier rollouts of a prompt as a source of drafts: which ones, and that a stopped run goes on with the same ones."""

import json

import pytest
import zstandard

from grpo.run import checkpoint
from grpo.run.history import History
from grpo.run.records import read_events, read_metrics, read_rollouts, rollout_path
from grpo.run.stop import Stopped
from grpo.train import train
from rollout.group import Prompt


def record(folder, step: int, rows: dict[str, list[list[int]]]) -> None:
    lines = [
        {"prompt_id": name, "prompt": "", "sample": i, "text": "", "token_ids": ids, "parts": {}, "extras": {}}
        for name, completions in rows.items()
        for i, ids in enumerate(completions)
    ]
    path = rollout_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(map(json.dumps, lines)).encode() + b"\n"))


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(name, "", [1]) for name in names]


def histories(history: History, step: int, *names: str) -> list[list[list[int]]]:
    return [prompt.history for prompt in history.of(prompts(*names), step)]


def test_a_prompt_gets_what_the_last_step_that_had_it_wrote(tmp_path):
    history = History(tmp_path, ahead=0)
    record(tmp_path, 1, {"a": [[5], [6]], "b": [[7], [8]]})
    history.sampled(1, ["a", "b"])
    record(tmp_path, 2, {"a": [[9], [9]]})
    history.sampled(2, ["a"])
    assert histories(history, 3, "b", "a", "c") == [[[7], [8]], [[9], [9]], []]
    assert history.steps == {"a": [2], "b": [1]}


def test_contract_12_a_batch_that_is_sampled_ahead_knows_no_later_step_than_its_weights(tmp_path):
    history = History(tmp_path, ahead=1)
    for step, names in enumerate(("ab", "a", "a"), start=1):
        record(tmp_path, step, {name: [[step]] for name in names})
        assert histories(history, step, "a") == [[[step - 2]] if step > 2 else []]
        history.sampled(step, names)
    assert histories(history, 4, "a", "b") == [[[2]], [[1]]]  # as step 3 may be under way
    assert history.steps == {"a": [2, 3], "b": [1]}


def test_a_record_that_is_missing_or_damaged_is_told_once_and_costs_its_drafts_alone(tmp_path):
    told = []
    history = History(tmp_path, ahead=0, on_missing=lambda step, why: told.append((step, why)))
    history.sampled(1, ["a"])
    history.sampled(2, ["b"])
    record(tmp_path, 2, {})
    rollout_path(tmp_path, 2).write_bytes(b"torn")
    for _ in range(2):
        assert histories(history, 3, "a", "b") == [[], []]
    assert [step for step, _ in told] == [1, 2]
    assert "no rollouts of step 1" in told[0][1]
    assert "damaged" in told[1][1]


def test_what_is_put_back_is_as_it_was(tmp_path):
    history = History(tmp_path, ahead=0)
    history.sampled(1, ["a"])
    before = history.steps
    history.sampled(2, ["a", "b"])
    assert before == {"a": [1]}


# ---- runs ----

# 5 steps of 4 prompts over 8 examples: epochs end after steps 2 and 4, and step 3 is in the middle of one.
RUN = {
    "steps": 5,
    "data.limit": 8,
    "rollout.temperature": 0.3,
    "rollout.draft_sources": ["siblings", "history"],
    "rollout.draft_tokens": 3,
}
KINDS = {
    "whole": {},
    "partial": {"rollout.partial": 4},
    "refills": {"rollout.refill_draws": 1, "rollout.refill_prompts": "same"},
    "with the head": {"rollout.draft_sources": ["head", "history", "siblings"]},
}


def drafts(folder, step: int) -> list[dict]:
    return [row["draft"] for row in read_rollouts(folder, step)]


def by_history(folder, step: int) -> int:
    return sum(sum(draft["sources"].get("history", {}).get("drafted", [])) for draft in drafts(folder, step))


def kept(folder, step: int) -> dict:
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    tensors = {(kind, n): t.numpy().tobytes() for kind, mapping in saved.tensors.items() for n, t in mapping.items()}
    return tensors | {"learner": saved.state["learner"], "curriculum": saved.state["curriculum"]}


@pytest.mark.parametrize("kind", KINDS)
def test_contract_9_a_stopped_run_goes_on_with_the_same_history(micro_config, tmp_path, kind):
    """To the bits of the checkpoints, and to the number of drafts of every source."""
    options = RUN | KINDS[kind]
    train(micro_config(tmp_path / "whole", **options))
    with pytest.raises(Stopped):
        train(micro_config(tmp_path / "run", **options), stop_after=3)
    train(micro_config(tmp_path / "run", **options), resume="auto")
    for step in range(1, 6):
        assert read_rollouts(tmp_path / "run", step) == read_rollouts(tmp_path / "whole", step)
        assert kept(tmp_path / "run", step) == kept(tmp_path / "whole", step)
    assert by_history(tmp_path / "whole", 1) == 0
    assert by_history(tmp_path / "whole", 5) > 0
    assert kept(tmp_path / "run", 3)["curriculum"]["history"]


def test_contract_3_a_run_learns_the_same_whatever_its_sources_of_drafts(micro_config, tmp_path):
    train(micro_config(tmp_path / "head", **RUN | {"rollout.draft_sources": ["head"], "mtp.loss_weight": 0}))
    train(micro_config(tmp_path / "lookup", **RUN | {"mtp.loss_weight": 0}))
    for step in range(1, 6):
        head, lookup = (read_rollouts(tmp_path / name, step) for name in ("head", "lookup"))
        assert [row["token_ids"] for row in head] == [row["token_ids"] for row in lookup]
        assert "history" not in kept(tmp_path / "head", step)["curriculum"]
    [line] = [
        line for line in read_metrics(tmp_path / "lookup") if line["step"] == 5 and "draft/empty_per_token" in line
    ]
    assert line["draft/history/drafted_depth_1"] > 0
    assert line["draft/drafted_depth_1"] == sum(
        line[f"draft/{name}/drafted_depth_1"] for name in ("history", "siblings")
    )
    assert "draft/head/drafted_depth_1" not in line


def test_a_run_goes_on_without_a_record_that_was_deleted(micro_config, tmp_path):
    options = RUN | {"steps": 4}
    train(micro_config(tmp_path / "whole", **options))
    with pytest.raises(Stopped):
        train(micro_config(tmp_path / "run", **options), stop_after=2)
    rollout_path(tmp_path / "run", 1).unlink()
    train(micro_config(tmp_path / "run", **options), resume="auto")
    for step in (3, 4):
        ids = [[row["token_ids"] for row in read_rollouts(tmp_path / name, step)] for name in ("run", "whole")]
        assert ids[0] == ids[1]
    [event] = [event for event in read_events(tmp_path / "run") if event["event"] == "history_missing"]
    assert event["step"] == 1

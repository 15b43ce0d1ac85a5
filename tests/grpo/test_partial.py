"""rollout.partial: completions go on in later steps, and a run with them is still repeated to the bit."""

import pytest

from grpo.config.sampling import RolloutOptions
from grpo.config.yaml_file import ConfigError
from grpo.run import checkpoint
from grpo.run.records import read_metrics, read_rollouts
from grpo.run.stop import Stopped
from grpo.steps.collector import Collector
from grpo.train import train
from rewards.group_score import RewardFailed, RewardFailure

PARTIAL = {"steps": 5, "rollout.partial": 4, "curriculum.by_difficulty": True}


def kept(folder, step: int) -> dict:
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    tensors = {(kind, n): t.numpy().tobytes() for kind, mapping in saved.tensors.items() for n, t in mapping.items()}
    return tensors | {"learner": saved.state["learner"], "curriculum": saved.state["curriculum"]}


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial") / "run"
    train(micro_config(folder, **PARTIAL))
    return folder


def test_a_long_completion_has_tokens_of_several_versions(whole):
    rows = [row | {"at": step} for step in range(1, 6) for row in read_rollouts(whole, step)]
    several = [row for row in rows if "policy_versions" in row]
    assert several
    for row in rows:
        versions = row.get("policy_versions") or [row["policy_version"]] * len(row["token_ids"])
        assert len(versions) == len(row["token_ids"]) == len(row["logprobs"]) == len(row["policy_logprobs"])
        assert versions == sorted(versions)
        assert len(row["token_ids"]) <= 10
        assert row["finish_reason"] == "stop" or len(row["token_ids"]) == 10
    for row in several:  # a budget of 4 in each step, and never a step left out
        versions = row["policy_versions"]
        assert versions[-1] - versions[0] == len(set(versions)) - 1
        assert all(versions.count(v) == 4 for v in sorted(set(versions))[1:-1])
        assert row["policy_version"] == versions[-1] <= row["at"] - 1


def test_a_group_is_learned_from_when_it_is_complete_and_counted_until_then(whole):
    metrics = [line for line in read_metrics(whole) if "rollout/carried" in line]
    counts = [len(read_rollouts(whole, step)) // 4 for step in range(1, 6)]
    waiting = [len(kept(whole, step)["curriculum"]["begun"]) for step in range(1, 6)]
    # Four new prompts in each step, and in the first four more for each budget after which no group was complete.
    begun = [sum(counts[: step + 1]) + waiting[step] for step in range(5)]
    assert begun == [12 + 4 * step for step in range(5)]
    assert [line["rollout/carried"] > 0 for line in metrics] == [number > 0 for number in waiting]
    assert any(waiting)
    assert all("mismatch/weight_mean" in line for line in metrics)  # the importance correction is on
    assert max(line.get("mismatch/age_mean", 0) for line in metrics) > 0


@pytest.mark.parametrize("stop", [1, 3])
def test_contract_9_a_stopped_run_goes_on_with_what_is_carried(micro_config, whole, tmp_path, stop):
    config = micro_config(tmp_path / "run", **PARTIAL)
    with pytest.raises(Stopped):
        train(config, stop_after=stop)
    train(config, resume="auto")
    assert [kept(tmp_path / "run", step) for step in range(1, 6)] == [kept(whole, step) for step in range(1, 6)]
    assert all(read_rollouts(tmp_path / "run", step) == read_rollouts(whole, step) for step in range(1, 6))


def test_contract_9_a_step_that_fails_gives_back_what_it_has_carried_on(micro_config, whole, tmp_path, monkeypatch):
    real = Collector._score

    def failing(self, groups, step):
        if step == 3:
            raise RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))
        return real(self, groups, step)

    config = micro_config(tmp_path / "run", **PARTIAL)
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "_score", failing)
        with pytest.raises(RewardFailed, match="boom"):
            train(config)
    assert kept(tmp_path / "run", 2) == kept(whole, 2)
    train(config, resume="auto")
    assert kept(tmp_path / "run", 5) == kept(whole, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"partial": True}, "partial.*number of tokens, such as 256, or null"),
        ({"partial": 0}, "partial.*greater than or equal to 1"),
        ({"partial": 8, "backend": "vllm"}, "rollout.partial=8.*seeds of its own.*another backend"),
        ({"partial": 8, "refill_draws": 2}, "rollout.partial=8 with rollout.refill_draws=2.*leave one of them out"),
    ],
)
def test_what_partial_cannot_do_is_refused(given, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        RolloutOptions(**given)

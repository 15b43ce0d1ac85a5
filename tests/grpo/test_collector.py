"""What the collector hands from one step to the next."""

import pytest

from grpo.run.records import read_rollouts
from grpo.train import train
from rollout.group import Completion, DraftStats, head_accepted
from rollout.pool import LocalPool


@pytest.fixture
def expected(monkeypatch):
    """`expected[step]`: what the controller was told of the head's drafts when the rollouts of the step began."""
    told, sample = {}, LocalPool.sample

    def noted(pool, prompts, params, *rest):
        told[params.step] = params.head_accepted
        return sample(pool, prompts, params, *rest)

    monkeypatch.setattr(LocalPool, "sample", noted)
    return told


def recorded(folder, step):
    lines = read_rollouts(folder, step)
    return head_accepted(Completion([], [], "", "stop", 0, draft=DraftStats(**line["draft"])) for line in lines)


def test_contract_9_what_became_of_the_drafts_of_a_step_is_what_the_next_one_expects(micro_config, tmp_path, expected):
    given = {"steps": 4, "eval.limit": 0}
    folder = tmp_path / "run"
    train(micro_config(folder, **given))
    shares = [recorded(folder, step) for step in (1, 2, 3)]
    assert all(len(share) == 2 for share in shares)
    assert len(set(shares)) > 1
    assert [expected[step] for step in (1, 2, 3, 4)] == [(), *shares]
    expected.clear()
    train(micro_config(tmp_path / "stopped", **given | {"steps": 2}))
    train(micro_config(tmp_path / "stopped", **given), resume="auto")
    assert [expected[step] for step in (1, 2, 3, 4)] == [(), *shares]


def test_groups_that_go_on_keep_the_parameters_with_which_they_began(micro_config, tmp_path, expected):
    train(micro_config(tmp_path / "run", **{"steps": 2, "eval.limit": 0, "rollout.partial": 40}))
    assert set(expected.values()) == {()}

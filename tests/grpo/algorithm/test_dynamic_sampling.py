from typing import get_args

import pytest

from grpo.algorithm.dynamic_sampling import draw_groups, is_tied
from grpo.algorithm.values import rank_softmax_weights
from grpo.config.loss import Advantage, LossOptions
from grpo.learner.prepare import estimate
from grpo.run.metrics import rollout_metrics
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.commands import replay as reward_replay
from rewards.group_score import GroupScore
from rewards.records import read_rollouts
from rollout.group import Prompt, RolloutGroup

TIED, MIXED = [1.0, 1.0], [0.0, 1.0]


def _prompt(name: str) -> Prompt:
    return Prompt(name, name, [1])


class Sampler:
    """Scores by (prompt, draw); whatever is not in `mixed` is tied."""

    def __init__(self, mixed: set[tuple[str, int]]) -> None:
        self.mixed, self.calls = mixed, []

    def __call__(self, prompts, draw):
        self.calls.append(([prompt.prompt_id for prompt in prompts], draw))
        rewards = [MIXED if (prompt.prompt_id, draw) in self.mixed else TIED for prompt in prompts]
        return [RolloutGroup(prompt, []) for prompt in prompts], [GroupScore(r, {}) for r in rewards]


def _same(tied, draw):
    return tied


def _new(tied, draw):
    return [_prompt(f"new{draw}.{i}") for i in range(len(tied))]


def _names(drawn) -> list[str]:
    return [group.prompt.prompt_id for group in drawn.groups]


ROUNDED = 0.1 + 0.2, 0.3


@pytest.mark.parametrize(
    ("rewards", "tied"),
    [
        (ROUNDED, True),
        ((sum([0.1] * 10), 1.0), True),
        ((None, *ROUNDED), True),
        ((-ROUNDED[0], -ROUNDED[1]), True),
        ((1e6 * ROUNDED[0], 1e6 * ROUNDED[1]), True),
        ((0.0, 1e-17), True),
        ((None, 1.0), True),
        ((0.0, 0.5), False),
        ((0.3, 0.3001), False),
        ((None, 0.3, 0.3001), False),
    ],
)
def test_contract_10_tied_means_one_thing_wherever_it_is_asked(rewards, tied):
    """Refill, metrics, replay and every estimator agree on a group, also where its rewards differ by rounding."""
    score, group = GroupScore(list(rewards), {"r": list(rewards)}), RolloutGroup(_prompt("a"), [])
    contrast = GroupScore([0.0, 2.0, None][: len(rewards)], {"r": [0.0, 2.0, None][: len(rewards)]})
    assert is_tied(score) is tied
    assert rollout_metrics([group], [score])["group/zero_variance"] == tied
    assert sum(map(reward_replay.tied, [list(rewards)])) == tied
    drawn = draw_groups([_prompt("a")], 1, lambda prompts, draw: ([group], [contrast if draw else score]), _same)
    assert (drawn.refilled == 1) is tied
    for options in [{"advantage": name} for name in get_args(Advantage)] + [
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ]:
        advantages, tied_P = estimate([score, contrast], LossOptions(**options), {"r": 1.0})
        assert tied_P.tolist() == [tied, False], options
        if options.get("advantage") not in ("gae", "rank_softmax", "reinforce_plus_plus"):  # not group-relative
            assert (not advantages[0].any()) is tied, options
            assert advantages[1].any(), options
    weights = rank_softmax_weights([rewards])[0]
    given = [weight for weight, reward in zip(weights.tolist(), rewards, strict=True) if reward is not None]
    assert (len(set(given)) == 1) is tied


def test_contract_10_parts_that_sum_to_a_tie_teach_nothing():
    """0.1 and 0.2 against 0.3 and 0: the score is what ties a group, whatever it is made of."""
    parts = {"a": [0.1, 0.3, 0.3], "b": [0.4, 0.0, 0.0]}
    score = GroupScore([0.1 + 0.5 * 0.4, 0.3, 0.3], parts)
    contrast = GroupScore([0.0, 1.0, 1.0], {"a": [0.0, 1.0, 1.0], "b": [0.0, 0.0, 0.0]})
    assert is_tied(score)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        loss = LossOptions(multi_objective_aggregation=aggregation)
        advantages, tied_P = estimate([score, contrast], loss, {"a": 1.0, "b": 0.5})
        assert tied_P.tolist() == [True, False]
        assert not advantages[0].any()
        assert advantages[1].any()


def test_without_a_budget_every_group_stays():
    sample = Sampler(set())
    drawn = draw_groups([_prompt("a"), _prompt("b")], 0, sample, _same)
    assert (_names(drawn), drawn.draws, drawn.replaced, drawn.refilled) == (["a", "b"], [0, 0], [], 0)
    assert sample.calls == [(["a", "b"], 0)]


def test_new_prompts_take_the_places_until_the_budget_is_spent():
    sample = Sampler({("b", 0), ("new1.1", 1), ("new3.0", 3)})
    drawn = draw_groups([_prompt(name) for name in "abc"], 2, sample, _new)
    assert sample.calls == [(["a", "b", "c"], 0), (["new1.0", "new1.1"], 1), (["new2.0"], 2)]
    assert (_names(drawn), drawn.draws) == (["a", "b", "new1.1"], [0, 0, 1])
    assert [group.prompt.prompt_id for group in drawn.all_groups] == ["a", "b", "new1.1", "new1.0", "c", "new2.0"]
    assert drawn.counts() == {"group/zero_variance": 1 / 3, "group/resampled": 1.0, "group/drawn": 6.0}
    drawn = draw_groups([_prompt(name) for name in "abc"], 9, Sampler(sample.mixed), _new)
    assert (_names(drawn), drawn.draws) == (["new3.0", "b", "new1.1"], [3, 0, 1])
    assert drawn.tied == []


COARSE = """
def coarse(completions, **_):
    return [float(completion.count("e") > 2) for completion in completions]
"""


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> list[dict]:
    """A reward of 0 or 1 that leaves many groups of a micro policy tied."""
    path = tmp_path_factory.mktemp("coarse") / "coarse.py"
    path.write_text(COARSE)
    return [{"function": f"{path}:coarse"}]


@pytest.fixture(scope="module")
def plain(micro_config, coarse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(micro_config(folder, rewards=coarse, steps=1))
    assert 0 < read_metrics(folder)[0]["group/zero_variance"] < 1, "the test needs tied groups and others"
    return folder


def _groups(folder, step=1) -> list[list[dict]]:
    lines = read_rollouts(folder, step)
    return [lines[i : i + 4] for i in range(0, len(lines), 4)]


def test_contract_4_a_refill_sees_new_noise_and_replaces_tied_groups_alone(micro_config, coarse, plain, tmp_path):
    train(micro_config(tmp_path / "r", rewards=coarse, steps=1, **{"rollout.max_resamples": 8}))
    before, after = _groups(plain), _groups(tmp_path / "r")
    tied = [len({line["reward"] for line in group}) < 2 for group in before]
    [line] = read_metrics(tmp_path / "r")
    assert line["group/resampled"] == sum(group[0]["draw"] > 0 for group in after) > 0
    assert line["group/zero_variance"] == sum(len({line["reward"] for line in group}) < 2 for group in after) / 4
    assert line["group/drawn"] > 4
    assert line["completion/tokens"] > sum(len(line["token_ids"]) for group in after for line in group)
    for was_tied, former, group in zip(tied, before, after, strict=True):
        if group[0]["draw"] == 0:
            assert [line["token_ids"] for line in group] == [line["token_ids"] for line in former]
        else:
            assert was_tied
            assert len({line["reward"] for line in group}) == 2
            assert group[0]["prompt_id"] not in {other[0]["prompt_id"] for other in before}
    tokens = [[line["token_ids"] for line in group] for group in before + [g for g in after if g[0]["draw"]]]
    assert len({repr(group) for group in tokens}) == len(tokens), "noise was seen twice"


def test_a_budget_of_zero_changes_nothing_and_logs_nothing(plain):
    [line] = read_metrics(plain)
    assert not {"group/resampled", "group/drawn"} & line.keys()
    assert {line["draw"] for line in read_rollouts(plain, 1)} == {0}

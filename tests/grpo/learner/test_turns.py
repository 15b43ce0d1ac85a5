"""Contract 14 in the learner: what tools wrote is read, and nothing is learned from it."""

from dataclasses import replace

import pytest
import torch
from small_learner import last_work, learner_of

from grpo.algorithm.values import gae
from grpo.learner.batch import collate
from grpo.learner.learner import Learner
from grpo.learner.row import PackedRow, Sample
from grpo.run.json_lines import rollout_lines
from grpo.run.metrics import rollout_metrics
from policies.mtp import draft_loss
from policies.policy import Policy
from rewards.episode import ToolStats
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

CPU = torch.device("cpu")
T, F = True, False
SAMPLED = [[T, T, F, F, F, T, T], [T, F, T, T, F, F, T, T], [T, T, T]]
SCORES = [GroupScore([1.0, 0.0, 0.2], {"exact": [1.0, 0.0, 0.2]})]


@torch.no_grad()
def _group(policy: Policy) -> RolloutGroup:
    """Three episodes, with the log-probabilities of the stock model where they were sampled, moved a little."""
    generator, completions = torch.Generator().manual_seed(3), []
    prompt = [5, 9, 17]
    for sampled in SAMPLED:
        ids = torch.randint(2, 300, (len(sampled),), generator=generator).tolist()
        logits = policy.trunk(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0] - 0.1
        kept = [value if own else 0.0 for value, own in zip(logprobs.tolist(), sampled, strict=True)]
        turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "name": "t", "content": "b"}]
        stats = ToolStats(calls=1, errors=0, bad_calls=1, reward=0.5)
        completions.append(Completion(ids, kept, "a b", "stop", 0, turns=turns, sampled=sampled, tools=stats))
    return RolloutGroup(Prompt("p/0", "text", prompt), completions)


def _learner(policy: Policy, mtp: float = 0.0, **loss) -> Learner:
    return learner_of(policy, mtp=mtp, learning_rate=1e-9, **loss)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss_type": "grpo"},
        {"beta": 0.2, "entropy_coef": 0.01, "importance_correction": "token_truncate"},
        {"loss_type": "dr_grpo", "importance_correction": "sequence_mask", "importance_sampling_level": "sequence"},
        {"advantage": "gae"},
    ],
)
def test_contract_14_the_gradient_of_what_tools_wrote_is_exactly_zero(micro_policy, monkeypatch, loss):
    """The gradient at the state that predicts each token: zero where a tool wrote, and nowhere else in a completion.
    A mask that is one place off fails here."""
    learner = _learner(micro_policy(0), **loss)
    states, preceding = [], learner.likelihood.preceding

    def leaf(mini, policy=None):
        state = preceding(mini, policy).detach()
        if torch.is_grad_enabled():
            states.append(state.requires_grad_())
        return state

    batch = learner.prepare([_group(learner.policy)], SCORES)
    assert batch.num_completion_tokens == 4 + 5 + 3
    monkeypatch.setattr(learner.likelihood, "preceding", leaf)
    learner.step(batch, 1)
    [state] = states
    learned = (state.grad.abs().sum(-1) > 0)[0, 3:].tolist()
    assert learned == [own for sampled in SAMPLED for own in sampled]


@pytest.mark.parametrize("loss", [{}, {"loss_type": "grpo"}, {"beta": 0.3}])
def test_the_loss_is_the_mean_over_sampled_tokens_alone(micro_policy, loss):
    """By hand from the stock model's log-probabilities: REINFORCE at ratio 1."""
    policy = micro_policy(1)
    learner, group = _learner(policy, **loss), _group(policy)
    batch = learner.prepare([group], SCORES)
    metrics = learner.step(batch, 1)
    advantages, expected = batch.advantages[0].tolist(), 0.0
    for advantage, sampled in zip(advantages, SAMPLED, strict=True):
        share = 1 / (3 * sum(sampled)) if loss.get("loss_type") == "grpo" else 1 / 12
        expected -= advantage * sum(sampled) * share  # the ratio is 1
    assert metrics["loss/policy"] == pytest.approx(expected, abs=1e-6)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0)
    first = last_work(learner).policy_logprobs[0]
    assert [value != 0 for value in first] == SAMPLED[0]


def test_the_head_learns_drafts_inside_a_turn_alone(micro_policy):
    """Which entries and depths have a gradient, against a loop over the tokens."""
    policy, depth = micro_policy(2), 3
    mini = collate([PackedRow([7, 8], [Sample(0, [4, 5, 6, 7, 8, 9, 4], sampled=[T, T, T, F, F, T, T])])], CPU)
    outputs = [torch.randn(1, 9, policy.lm_head.shape[1], requires_grad=True) for _ in range(depth)]
    draft_loss(outputs, torch.randn(1, 9, policy.lm_head.shape[1]), mini.turn, policy.lm_head, 1.0).backward()
    sampled = [F, F, T, T, T, F, F, T, T]
    for d, output in enumerate(outputs, start=1):
        expected = [n + d < 9 and all(sampled[n : n + d + 1]) for n in range(9)]
        assert (output.grad.abs().sum(-1) > 0)[0].tolist() == expected


def test_values_pass_over_what_tools_wrote():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.3, 0.5, 0.8])
    plain = gae(rewards[None], values[None], torch.ones(1, 3, dtype=torch.bool), 0.7)
    holes = torch.tensor([[T, F, F, T, T]])
    wide = [torch.zeros(1, 5).masked_scatter(holes, x) for x in (rewards, values)]
    wide[1][0, 1:3] = 99.0
    for short, long in zip(plain, gae(*wide, holes, 0.7), strict=True):
        assert torch.equal(long[holes], short[0])
        assert not long[~holes].any()


def test_records_metrics_and_checkpoints_keep_the_turns(micro_policy):
    group = _group(micro_policy(0))
    line = rollout_lines([group], SCORES, [[1.0, -1.0, 0.0]])[0]
    assert line["sampled"] == SAMPLED[0]
    assert line["turns"][1]["name"] == "t"
    assert line["tools"] == {"calls": 1, "errors": 0, "bad_calls": 1, "reward": 0.5, "failure": None}
    plain = replace(group.completions[0], turns=[], sampled=[], tools=None)
    assert "turns" not in rollout_lines([replace(group, completions=[plain] * 3)], SCORES, [[0.0] * 3])[0]
    metrics = rollout_metrics([group], SCORES)
    assert metrics["completion/tokens"] == 12
    assert metrics["tools/tokens"] == 6
    assert metrics["tools/bad_calls"] == 1.0
    entropy = [-p for c in group.completions for p, own in zip(c.logprobs, c.sampled, strict=True) if own]
    assert metrics["policy/entropy"] == pytest.approx(sum(entropy) / 12)

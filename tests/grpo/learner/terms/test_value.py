"""PPO and rank_softmax: value head, token advantages by hand, the step they take, and what is saved of them."""

import copy
import math

import pytest
import torch
from resumed import whole_and_parts
from safetensors import safe_open
from small_learner import assert_close, gradients_of, learner_of, term_of

import grpo.learner.terms.value
from grpo.algorithm import values as value_functions
from grpo.config.loss import LossOptions
from grpo.config.value import ValueOptions
from grpo.learner.batch import TrainingBatch
from grpo.learner.learner import Learner
from grpo.learner.parallel import Ranks
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.value import ValueHead, explained_variance, with_token_advantages
from grpo.run import checkpoint
from policies.logprobs import token_logprobs
from review.readers.run_folder import read_metrics
from rewards.group_score import LARGEST, GroupScore
from rewards.records import read_rollouts
from rollout.group import Completion, Prompt, RolloutGroup

REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
LENGTHS = ((4, 2, 6), (1, 5, 3), (2, 2, 3))


def _learner(policy, advantage="gae", *, value=None, **given) -> Learner:
    return learner_of(
        policy, advantage=advantage, value=ValueOptions(**(value or {})), **{"max_grad_norm": 1.0} | given
    )


def _groups(seed=0) -> list[RolloutGroup]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(2, 300, (count,), generator=generator).tolist()

    return [
        RolloutGroup(
            Prompt(f"p/{g}", "", tokens(1 + 3 * g)), [Completion(tokens(n), [-1.0] * n, "", "stop", 0) for n in lengths]
        )
        for g, lengths in enumerate(LENGTHS)
    ]


def _scores(rewards=REWARDS) -> list[GroupScore]:
    return [GroupScore(list(row), {"exact": list(row)}) for row in rewards]


def _batch(bad_in_loss: bool = True) -> TrainingBatch:
    """One group: a good completion of two tokens, a bad one of one token, one without a reward."""
    samples = [Sample(0, [5, 6]), Sample(1, [7], in_loss=bad_in_loss)]
    return TrainingBatch([PackedRow([3], samples)], torch.zeros(1, 3), 2, 3)


VALUES = {0: torch.tensor([0.5, 0.8]), 1: torch.tensor([0.4])}


@pytest.fixture
def unwhitened(monkeypatch) -> None:
    """Advantages as GAE gives them."""
    monkeypatch.setattr(grpo.learner.terms.value, "whiten", lambda advantages, mask: advantages)


def test_token_advantages_by_hand(unwhitened):
    # δ of the first: 0.8 - 0.5 = 0.3, 1 - 0.8 = 0.2; λ = ½ gives 0.3 + 0.1 = 0.4 and 0.2. Of the second: 0 - 0.4.
    options = ValueOptions(lam=0.5)
    batch = with_token_advantages(_batch(), VALUES, [[1.0, 0.0, None]], options)
    good, bad = batch.rows[0].samples
    assert good.token_advantages == pytest.approx([0.4, 0.2])
    assert good.returns == pytest.approx([0.9, 1.0])
    assert good.values == pytest.approx([0.5, 0.8])
    assert bad.token_advantages == pytest.approx([-0.4])
    assert bad.returns == pytest.approx([0.0])
    assert batch.advantages == [[good.token_advantages, bad.token_advantages, []]]
    residuals, returns = [0.4, 0.2, -0.4], [0.9, 1.0, 0.0]
    mean, spread = sum(residuals) / 3, sum(returns) / 3
    explained = 1 - sum((x - mean) ** 2 for x in residuals) / sum((x - spread) ** 2 for x in returns)
    assert batch.metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-6)


def test_whitening_by_hand():
    # 0.4, 0.2, -0.4: mean 1/15, std √((1/9 + 4/225 + 49/225) / 2) = √(78/225 / 2)
    batch = with_token_advantages(_batch(), VALUES, [[1.0, 0.0, None]], ValueOptions(lam=0.5))
    std = math.sqrt(78 / 225 / 2) + 1e-4
    expected = [(a - 1 / 15) / std for a in (0.4, 0.2, -0.4)]
    flat = [a for sample in batch.rows[0].samples for a in sample.token_advantages]
    assert flat == pytest.approx(expected, abs=1e-5)
    # a completion that is not in the loss has no say in mean and std
    batch = with_token_advantages(_batch(bad_in_loss=False), VALUES, [[1.0, 0.0, None]], ValueOptions(lam=0.5))
    std = math.sqrt(0.02) + 1e-4
    assert batch.rows[0].samples[0].token_advantages == pytest.approx([0.1 / std, -0.1 / std], abs=1e-4)


def test_rank_weights_by_hand(unwhitened, micro_policy):
    """Ranks 1 and 0 of the two that were scored: weights e / (1 + e) and 1 / (1 + e), on Â = R - V with V = 0."""
    learner = _learner(micro_policy(0), "rank_softmax", value={"lam": 1.0})
    assert learner.loss.loss_type == "reinforce"
    groups = _groups()[:1]
    batch = learner.prepare(groups, _scores([[2.0, -1.0, None]]))
    e = math.e
    assert batch.rows[0].samples[0].token_advantages == pytest.approx([2 * e / (1 + e)] * 4)
    assert batch.rows[0].samples[1].token_advantages == pytest.approx([-1 / (1 + e)] * 2)
    assert batch.advantages[0][2] == []


def test_a_weight_is_that_of_its_completion_also_after_one_without_a_reward(unwhitened):
    """Â = R - V with V = 0 and λ = 1, times the weight of the same place in [P, G]."""
    rows = [PackedRow([3], [Sample(0, [5]), Sample(2, [6, 7])]), PackedRow([4], [Sample(3, [8]), Sample(4, [9])])]
    batch = TrainingBatch(rows, torch.zeros(2, 3), 4, 5)
    values = {sample.index: torch.zeros(len(sample.token_ids)) for row in rows for sample in row.samples}
    rewards = [[1.0, None, 2.0], [3.0, 4.0, None]]
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    options = ValueOptions(lam=1.0)
    weighted = with_token_advantages(batch, values, rewards, options, weights_PG=weights).advantages
    flat = [advantage for group in weighted for tokens in group for advantage in tokens]
    assert flat == pytest.approx([1 * 0.1, 2 * 0.3, 2 * 0.3, 3 * 0.4, 4 * 0.5])


def test_another_loss_may_be_asked_for():
    for given, loss in (({}, "reinforce"), ({"loss_type": "dapo"}, "dapo")):
        assert LossOptions(advantage="rank_softmax", **given).loss_type == loss
    assert LossOptions(advantage="gae").loss_type == "dapo"
    assert explained_variance(torch.rand(3), torch.ones(3)) == {}, "all returns are one"


def test_the_value_head_starts_at_zero_and_draws_nothing_from_the_global_noise():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    head, again = ValueHead(8, 4), ValueHead(8, 4)
    assert torch.equal(torch.rand(2), expected)
    assert not head(torch.randn(5, 8)).any()
    assert torch.equal(head.layers[0].weight, again.layers[0].weight)
    assert len(list(ValueHead(8, 0).parameters())) == 2
    assert head(torch.randn(5, 8).bfloat16()).dtype == torch.float32


def _padded_hidden(policy, prompt, ids):
    """Stock hidden states that precede the tokens of one completion, and log π of them."""
    out = policy.trunk(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
    first = len(prompt) - 1
    logprobs = token_logprobs(out.logits[0, first:-1], torch.tensor(ids))
    return out.hidden_states[-1][0, first:-1], logprobs


@pytest.mark.parametrize("advantage", ["gae", "rank_softmax"])
def test_one_step_against_the_stock_model(micro_policy, advantage, monkeypatch):
    """Values, GAE, weights, both losses and their gradients, from plain padded rows and the formulas."""
    monkeypatch.setattr(grpo.learner.terms.value, "HIDDEN", 0)  # a linear value head
    policy = micro_policy(1)
    by_hand = copy.deepcopy(policy)
    learner = _learner(policy, advantage, max_grad_norm=1e9, value={"lam": 0.9})
    with torch.no_grad():
        term_of(learner, "value").head.layers[0].weight.normal_(0, 0.1)
    head = copy.deepcopy(term_of(learner, "value").head)
    groups = _groups(1)
    metrics = learner.step(learner.prepare(groups, _scores()), 1)

    cells = []
    for group, rewards in zip(groups, REWARDS, strict=True):
        ranks = [sum(o < r for o in rewards) + (sum(o == r for o in rewards) - 1) / 2 for r in rewards]
        total = sum(map(math.exp, ranks))
        for completion, reward, rank in zip(group.completions, rewards, ranks, strict=True):
            hidden, logprobs = _padded_hidden(by_hand, group.prompt.token_ids, completion.token_ids)
            values = head(hidden.detach())
            deltas = [*(values[1:] - values[:-1]).tolist(), reward - values[-1].item()]
            gae = [sum(0.9 ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]
            returns = torch.tensor(gae) + values.detach()
            cells.append((torch.tensor(gae), returns, values, logprobs, math.exp(rank) / total))
    everything = torch.cat([gae for gae, *_ in cells])
    mean, std = everything.mean(), everything.std() + 1e-4
    loss = value = torch.zeros(())
    for gae, returns, values, logprobs, weight in cells:
        advantages = (gae - mean) / std * (weight if advantage == "rank_softmax" else 1.0)
        score = logprobs if advantage == "rank_softmax" else (logprobs - logprobs.detach()).exp()
        loss = loss - (advantages * score).sum() / len(everything)
        value = value + (values - returns).square().sum() / len(everything) / 2
    (loss + 0.1 * value).backward()
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["loss/value"] == pytest.approx(value.item(), abs=1e-5)
    for name, expected in (gradients_of(by_hand.trunk) | gradients_of(head)).items():
        module = term_of(learner, "value").head if name.startswith("layers.") else policy.trunk
        got = module.get_parameter(name).grad
        assert (got - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("advantage", ["gae", "rank_softmax"])
def test_contract_10_micro_batches_change_nothing_with_values(micro_policy, advantage):
    gradients, metrics = [], []
    for budget in (10_000, 20, 9):
        policy = micro_policy(2)
        learner = _learner(policy, advantage, tokens_per_micro_batch=budget, learning_rate=1e-9)
        metrics.append(learner.step(learner.prepare(_groups(2), _scores()), 1))
        gradients.append(gradients_of(policy.trunk) | gradients_of(term_of(learner, "value").head))
    for other in gradients[1:]:
        assert_close(other, gradients[0])
    for name in ("loss/policy", "loss/value", "value/grad_norm", "loss/total"):
        assert [m[name] for m in metrics] == pytest.approx([metrics[0][name]] * 3, rel=1e-4, abs=1e-6)


class _Reader(Ranks):
    """One of `readers`, who knows what the others say."""

    def __init__(self, reader: int, readers: int, known: dict) -> None:
        super().__init__()
        self.size, self.reader, self.readers, self.known = readers, reader, readers, known

    def gather(self, own):
        self.own = own
        return [self.known, own]


def test_every_rank_values_its_share_of_the_rows(micro_policy):
    learner = _learner(micro_policy(2), tokens_per_micro_batch=20)
    with torch.no_grad():
        term_of(learner, "value").head.layers[-1].weight.fill_(0.1)
    found: list[dict] = []
    for reader, readers in ((0, 1), (0, 2), (1, 2)):
        learner.ranks = _Reader(reader, readers, found[0] if found else {})
        learner.prepare(_groups(2), _scores())
        found.append(learner.ranks.own)
    alone, *shares = found
    assert shares[0].keys() & shares[1].keys() == set()
    assert min(map(len, shares)) >= 3
    both = shares[0] | shares[1]
    assert both.keys() == alone.keys() == set(range(9))
    assert all(torch.allclose(both[i], values, atol=1e-6) for i, values in alone.items())


def test_truncated_completions_that_are_masked_teach_no_values(micro_policy):
    """What such a completion would have got is nobody's business: the same step, whatever its reward is."""
    steps = []
    for reward, reason in ((0.0, "length"), (5.0, "length"), (5.0, "stop")):
        learner = _learner(micro_policy(0), mask_truncated_completions=True)
        groups = _groups()
        groups[0].completions[1].finish_reason = reason
        rewards = [[1.0, reward, 0.5], *REWARDS[1:]]
        metrics = learner.forward_backward(learner.prepare(groups, _scores(rewards)))
        head, trunk = term_of(learner, "value").head, learner.policy.trunk
        steps.append((metrics["loss/value"], gradients_of(head), gradients_of(trunk)))
    (loss, *gradients), (same, *others), (other, *_) = steps
    assert loss == pytest.approx(same, rel=1e-6)
    for one, two in zip(gradients, others, strict=True):
        assert one
        assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)
    assert other != pytest.approx(loss, rel=1e-2)


def test_values_without_returns_are_not_taught(micro_policy):
    """Advantages of one's own and gold solutions say nothing of what the score will be."""
    learner = _learner(micro_policy(4))
    with torch.no_grad():
        term_of(learner, "value").head.layers[-1].weight.fill_(0.1)
    before = term_of(learner, "value").head.layers[-1].weight.clone()
    metrics = learner.step(learner.prepare(_groups(4), _scores(), [[1.0, 0.0, -1.0]] * 3), 1)
    assert "loss/value" not in metrics
    assert torch.equal(term_of(learner, "value").head.layers[-1].weight, before)


def test_several_updates_meet_the_clips(micro_policy, monkeypatch):
    monkeypatch.setattr(value_functions, "CLIPRANGE", 0.01)
    learner = _learner(micro_policy(8), updates_per_batch=4, learning_rate=1e-2, epsilon=0.05)
    metrics = learner.step(learner.prepare(_groups(8), _scores()), 1)
    assert metrics["policy/clip_fraction"] > 0
    assert metrics["value/clip_fraction"] > 0


def test_equal_advantages_are_whitened_to_zero_and_the_values_learn_all_the_same(micro_policy):
    """V = 0 and λ = 1: every advantage is the score, 1, of which whitening leaves 0. Every return is 1, the value
    loss ½ (0 - 1)². Where the score is 0, too, no step is taken."""
    learner = _learner(micro_policy(0), value={"lam": 1.0})
    nothing = learner.prepare(_groups(), _scores([[0.0] * 3] * 3))
    assert nothing.tied_groups == 3
    assert learner.step(nothing, 1)["learner/updates"] == 0
    batch = learner.prepare(_groups(), _scores([[1.0] * 3] * 3))
    assert (batch.all_tied, batch.tied_groups) == (True, 3)
    assert all(sample.returns == [1.0] * len(sample.token_ids) for row in batch.rows for sample in row.samples)
    head = term_of(learner, "value").head
    before = copy.deepcopy(head.state_dict())
    metrics = learner.step(batch, 2)
    assert metrics["learner/updates"] == 1
    assert metrics["loss/value"] == pytest.approx(0.5)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize("advantage", ["gae", "rank_softmax"])
def test_the_largest_scores_that_a_reward_may_give_take_a_finite_step(micro_policy, advantage):
    learner = _learner(micro_policy(0), advantage)
    largest = [[LARGEST, -LARGEST, 0.0], [0.0, LARGEST, 1.0], [1.0, 1.0, 1.0]]
    metrics = learner.step(learner.prepare(_groups(), _scores(largest)), 1)  # raises NonFiniteStep otherwise
    assert metrics["learner/updates"] == 1.0


def test_the_value_head_is_never_published_and_a_state_with_another_estimator_is_refused(micro_policy):
    learner, plain = _learner(micro_policy(0)), _learner(micro_policy(0), "group_relative")
    assert ["value" in {term.name for term in each.terms} for each in (learner, plain)] == [True, False]
    assert learner.weights().keys() == plain.weights().keys()
    assert ["value" in each.state()[0] for each in (learner, plain)] == [True, False]
    for saved, resumed in ((learner, plain), (plain, learner)):
        with pytest.raises(ValueError, match=r"the checkpoint's value tensors .* resume with .*loss\.advantage"):
            resumed.load_state(*saved.state())


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "rank_softmax"])
def test_contract_9_a_stopped_run_with_values_resumes_to_the_same_bits(micro_config, tmp_path, advantage):
    given = {"loss.advantage": advantage, "learner.updates_per_batch": 2, "data.limit": 10, "sft.steps": 0}
    _, folder = whole_and_parts(lambda path: micro_config(path, **given), tmp_path)
    before, after = (checkpoint.load(folder / f"checkpoints/step_{step:06d}").tensors for step in (1, 3))
    assert after.keys() == {"policy", "optimizer", "value"}
    assert any(name.startswith("value.") for name in after["optimizer"])
    assert all(not torch.equal(t, before["value"][name]) for name, t in after["value"].items())
    line = read_rollouts(folder, 3)[0]
    assert len(line["advantage"]) == len(line["token_ids"])
    assert {"loss/value", "value/clip_fraction", "value/grad_norm"} <= read_metrics(folder)[2].keys()
    with safe_open(folder / "policy/model.safetensors", framework="pt") as saved:
        assert not any(name.startswith(("value", "layers")) for name in saved.keys())  # noqa: SIM118

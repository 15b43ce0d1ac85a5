import pytest
import torch
import torch.nn.functional as F
from small_learner import supervised_learner

from grpo.config.learner import MTPOptions, SftMTPOptions
from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.batch import collate
from grpo.learner.prepare import supervised
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.draft_head import gold_draft_loss, teaching
from rewards.config.options import ConfigError, load

ROWS = [
    PackedRow([5, 6, 7], [Sample(0, [8, 9, 10, 11]), Sample(1, [12, 13])]),
    PackedRow([6, 5], [Sample(2, [9, 8, 7])]),
]


def _preceding(policy, mini):
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    return hidden.gather(1, mini.before[..., None].expand_as(hidden))


def test_the_loss_is_the_cross_entropy_of_the_gold_tokens_averaged_over_depths(random_policy):
    """Drafts at depth d of a completion of n tokens: n − d, each of a token of that completion."""
    policy = random_policy(1)
    mini = collate(ROWS, torch.device("cpu"))
    preceding = _preceding(policy, mini)
    loss = gold_draft_loss(policy, preceding, mini, [0, 1], depth=2)
    outputs = policy.unroll(preceding, mini.token_ids, mini.position_ids, mini.head_segment, 2)
    # (row, entry, depth, gold): completions stand behind the prompt, one after the other.
    drafts = [(0, 3, 1, 9), (0, 4, 1, 10), (0, 5, 1, 11), (0, 7, 1, 13), (1, 2, 1, 8), (1, 3, 1, 7)]
    drafts += [(0, 3, 2, 10), (0, 4, 2, 11), (1, 2, 2, 7)]
    expected = sum(
        F.cross_entropy(F.linear(outputs[depth - 1][row, entry], policy.lm_head).float(), torch.tensor(gold))
        for row, entry, depth, gold in drafts
    )
    torch.testing.assert_close(loss, expected / 2, rtol=1e-5, atol=1e-5)
    only = gold_draft_loss(policy, preceding, mini, [1], depth=2)
    assert 0 < only < loss


def test_each_token_of_the_taught_groups_has_the_same_weight(random_policy):
    policy, options = random_policy(1), MTPOptions(loss_weight=3.0)
    rows = [PackedRow([5], [Sample(0, [1, 2])], group=group) for group in (0, 1, 2, 2)]
    assert teaching(policy, options, rows, step=1) == dict.fromkeys((0, 1, 2), 3.0 / 8)
    assert teaching(policy, options, rows[:1], step=2) == {0: 1.5}
    assert teaching(policy, MTPOptions(loss_weight=0.0), rows, step=1) == {}


@pytest.mark.parametrize("kind", [MTPOptions, SftMTPOptions])
def test_the_metric_is_in_nats_per_token_whatever_the_weight_is(random_policy, kind):
    found = []
    for weight in (1.0, 0.1):
        learner = supervised_learner(random_policy(1), mtp=kind(depth=2, loss_weight=weight))
        found.append(learner.forward_backward(supervised(ROWS, 1))["loss/mtp"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def _gradients(policy, options: MTPOptions) -> dict[str, torch.Tensor]:
    metrics = supervised_learner(policy, mtp=options).forward_backward(supervised(ROWS, 1))
    assert metrics["loss/mtp"] > 0
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_train_base_model_adds_the_heads_gradient_to_the_trunks(random_policy):
    """Its gradient is that of λ/tokens · loss through hidden states, embeddings and LM head, beside the SFT loss's."""
    plain = _gradients(random_policy(1), MTPOptions(depth=2, loss_weight=0.3))
    trained = _gradients(random_policy(1), SftMTPOptions(depth=2, loss_weight=0.3, train_base_model=True))
    policy = random_policy(1)
    mini = collate(ROWS, torch.device("cpu"))
    (0.3 / 9 * gold_draft_loss(policy, _preceding(policy, mini), mini, [0, 1], 2)).backward()
    alone = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    for name in ("trunk.model.embed_tokens.weight", "trunk.lm_head.weight", "trunk.model.layers.0.mlp.up_proj.weight"):
        assert alone[name].abs().max() > 0
        torch.testing.assert_close(trained[name], plain[name] + alone[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained["mtp.eh_proj.weight"], alone["mtp.eh_proj.weight"], rtol=1e-4, atol=1e-6)


def test_contract_7_grpo_refuses_it(tmp_path):
    with pytest.raises(ConfigError, match="mtp.train_base_model=true .command line.: quartet train does not use it"):
        load(TrainConfig, None, {"output_dir": tmp_path, "mtp.train_base_model": True})
    assert load(SftConfig, None, {"output_dir": tmp_path, "mtp.train_base_model": True}).mtp.train_base_model

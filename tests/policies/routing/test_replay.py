"""Replayed experts: what they are, what weighs them, and where the router goes on choosing."""

import pytest
import torch

from policies.routing.replay import RoutingReplay
from policies.routing.routers import RoutingRecorder

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
POSITIONS = torch.arange(4).expand(2, 4)
CAUSAL = torch.zeros_like(IDS)


@pytest.fixture
def policy(random_policy):
    return random_policy(0, num_hidden_layers=3, routed_scaling_factor=1.7)  # two MoE layers, four experts


def _record(policy, replay=None):
    with RoutingReplay([policy.trunk], replay), RoutingRecorder(policy.trunk) as recorder:
        hidden = policy.hidden(IDS, POSITIONS, CAUSAL)
    return hidden, torch.stack(recorder.experts, dim=1).view(2, 4, 2, 2)


def test_its_own_choice_replayed_changes_nothing(policy):
    hidden, experts = _record(policy)
    again, same = _record(policy, experts)
    assert torch.equal(same, experts)
    torch.testing.assert_close(again, hidden, rtol=0, atol=1e-6)
    turned, _ = _record(policy, experts.flip(-1))  # in any order
    torch.testing.assert_close(turned, hidden, rtol=0, atol=1e-5)


def test_other_experts_are_used_and_weighed_by_their_own_scores(policy):
    hidden, experts = _record(policy)
    others = (experts + 1) % 4
    replayed, used = _record(policy, others)
    assert torch.equal(used, others)
    assert not torch.allclose(replayed, hidden, atol=1e-3)
    # The same by another way: a bias so large that the router itself has no other choice, one token at a time.
    routers = [layer.mlp.gate for layer in policy.trunk.model.layers[1:]]
    token = torch.tensor([[5]])
    for layer, router in enumerate(routers):
        router.e_score_correction_bias.fill_(-100.0)
        router.e_score_correction_bias[others[0, 0, layer]] = 100.0
    forced = policy.hidden(token, *[torch.zeros_like(token)] * 2)
    torch.testing.assert_close(replayed[0, 0], forced[0, 0], rtol=0, atol=1e-5)


def test_tokens_without_a_record_choose_themselves(policy):
    hidden, experts = _record(policy)
    partial = (experts + 1) % 4
    partial[0] = -1  # the first row was not recorded
    replayed, used = _record(policy, partial)
    assert torch.equal(used[0], experts[0])
    assert torch.equal(used[1], partial[1])
    torch.testing.assert_close(replayed[0], hidden[0], rtol=0, atol=1e-6)


def test_the_router_goes_on_learning(policy):
    _, experts = _record(policy)
    with RoutingReplay([policy.trunk], (experts + 1) % 4):
        policy.hidden(IDS, POSITIONS, CAUSAL)[..., 0].sum().backward()
    for layer in policy.trunk.model.layers[1:]:
        assert layer.mlp.gate.weight.grad.abs().sum() > 0


def test_a_record_of_another_policy_is_refused(policy):
    with pytest.raises(ValueError, match="the recorded routing is of 5 routers, this policy has 2"):
        _record(policy, torch.zeros(2, 4, 5, 2, dtype=torch.int16))
    assert torch.equal(_record(policy)[1], _record(policy)[1])

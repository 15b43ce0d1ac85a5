"""One update by hand: what is clipped, how fast each group moves, and what raises."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo.config.learner import LearnerOptions
from grpo.learner.master_weights import MasterWeights
from grpo.learner.update import NonFiniteStep, Update


def average(tensors):
    for tensor in tensors:
        tensor.grad /= 2


RANKS = SimpleNamespace(size=2, readers=2, average_gradients=average)


def two(dtype=torch.float32) -> tuple[Update, nn.ModuleDict]:
    """A trunk of two weights at the rate .1, and a head of one at .3, which the schedule doubles at step 2."""
    modules = nn.ModuleDict({"trunk": nn.Linear(2, 1, bias=False), "head": nn.Linear(1, 1, bias=False)}).to(dtype)
    for parameter in modules.parameters():
        nn.init.zeros_(parameter)
    rates = zip(modules.parameters(), (0.1, 0.3), strict=True)
    groups = [{"params": [weight], "peak": rate, "weight_decay": 0.0} for weight, rate in rates]
    options = LearnerOptions(max_grad_norm=1.0)
    return Update(MasterWeights(modules), groups, options, lambda step: step), modules


def loss_of(modules, more: float = 0.0) -> torch.Tensor:
    """Its gradients are 3, 4 and .5."""
    trunk, head = modules.parameters()
    return 3 * trunk[0, 0] + 4 * trunk[0, 1] + 0.5 * head.sum() + more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_by_hand(dtype):
    """Gradients are averaged over the ranks, and clipped by module. AdamW moves a weight whose gradient stays by the
    learning rate."""
    update, modules = two(dtype)
    trunk, head = modules.parameters()
    assert update.optimizer.defaults["fused"]
    versions = [trunk._version, head._version]
    update.backward(loss_of(modules), 2, RANKS)
    norms = update.make(2, RANKS, modules)
    assert norms == pytest.approx({"trunk": 5.0, "head": 0.5, "learning_rate": 0.2})
    gradients = [update.masters.of(weight).grad.tolist()[0] for weight in (trunk, head)]
    assert gradients[0] == pytest.approx([0.6, 0.8])
    assert gradients[1] == [0.5]
    assert [*trunk.tolist()[0], head.item()] == pytest.approx([-0.2, -0.2, -0.6], rel=1e-2)
    assert trunk._version > versions[0]
    assert head._version > versions[1]
    update.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)  # as a checkpoint may have it
    update.zero()
    update.backward(loss_of(modules), 3, RANKS)
    assert update.make(3, RANKS, modules, learning_rate=0.05)["learning_rate"] == pytest.approx(0.05)
    assert [*trunk.tolist()[0], head.item()] == pytest.approx([-0.25, -0.25, -0.75], rel=1e-2)
    assert isinstance(update.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert update.count == 2


def test_what_is_not_finite_raises_and_moves_nothing():
    update, modules = two()
    alone = SimpleNamespace(size=1, readers=1, average_gradients=lambda tensors: None)
    with pytest.raises(NonFiniteStep, match="step 2: the loss is nan") as raised:
        update.backward(loss_of(modules, math.nan), 2, alone)
    assert raised.value.everywhere
    update.backward(loss_of(modules, math.nan), 2, RANKS)  # another rank may have the gradient that tells
    modules["head"].weight.grad.fill_(math.inf)
    with pytest.raises(NonFiniteStep, match=r"step 2: the gradient norm is 5.0 \(head: inf\)"):
        update.make(2, RANKS, modules)
    assert [parameter.grad for parameter in modules.parameters()] == [None, None]
    assert not any(parameter.any() for parameter in modules.parameters())
    assert update.count == 0
    assert update.make(2, alone, modules)["head"] == 0, "no gradient has the norm 0"

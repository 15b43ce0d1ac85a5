"""What the optimizer moves, and how fast, by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo.learner import optimizer
from grpo.learner.optimizer import by_mesh, freeze_exact_parts, groups_of, norm_of, ramp, schedule


def test_what_is_trained_in_groups_by_hand():
    """Weight decay is on matrices only, and what is frozen is in no group."""
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    module[2].weight.requires_grad_(False)
    matrices, others = groups_of(module, 0.5, 0.25)
    [matrix] = matrices.pop("params")
    assert matrix is module[0].weight
    assert {id(weight) for weight in others.pop("params")} == {id(p) for p in module.parameters() if p.dim() == 1}
    assert [matrices, others] == [{"peak": 0.5, "weight_decay": 0.25}, {"peak": 0.5, "weight_decay": 0.0}]
    assert groups_of(None, 0.5, 0.25) == groups_of(module[2], 0.5, 0.25) == []


@pytest.mark.parametrize(("backend", "trains"), [("native", [False, True]), ("transformers", [True, True])])
def test_what_makes_a_conversion_exact_is_frozen_where_we_have_converted(monkeypatch, backend, trains):
    monkeypatch.setattr(optimizer, "frozen_parameter_names", lambda config: ["norm.weight", "other.weight"])
    trunk = nn.ModuleDict({"norm": nn.LayerNorm(2, bias=False), "head": nn.Linear(2, 1, bias=False)})
    freeze_exact_parts(SimpleNamespace(trunk=trunk, config=None, backend=backend))
    assert [parameter.requires_grad for parameter in trunk.parameters()] == trains


def test_a_norm_by_hand(monkeypatch):
    monkeypatch.setattr(optimizer, "PIECE", 2)
    assert norm_of([torch.tensor([[1.0, -2.0], [4.0, 0.0]]), torch.tensor([2.0])]).item() == 5
    assert norm_of([torch.tensor([3.0, 4.0])]).item() == 5
    tensors = [torch.zeros(1), torch.ones(2, 2)]
    [together] = by_mesh(tensors)
    assert list(map(id, together)) == list(map(id, tensors))


@pytest.mark.parametrize(
    ("kind", "steps", "warmup", "expected"),
    [
        ("constant", 4, 0, [1, 1, 1, 1]),
        ("constant", 4, 2, [0.5, 1, 1, 1]),
        ("linear", 4, 2, [0.5, 1, 1, 0.5]),
        ("cosine", 4, 0, [1, 0.8536, 0.5, 0.1464]),
        ("linear", 2, 2, [0.5, 1, 1]),  # one step more than was planned
        ("linear", 3, 2, [0.5, 1, 1, 0]),
    ],
)
def test_rates_by_hand(kind, steps, warmup, expected):
    factors = [schedule(kind, steps, warmup)(step) for step in range(1, len(expected) + 1)]
    assert factors == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("steps", "expected"), [(3, [1, 2, 3, 3]), (5, [1, 1.5, 2, 2.5]), (2, [1, 3, 3, 3]), (1, [3] * 4), (0, [3] * 4)]
)
def test_a_ramp_by_hand(steps, expected):
    assert [ramp(step, steps, 1, 3) for step in (1, 2, 3, 4)] == expected

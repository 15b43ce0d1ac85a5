"""The three balancing mechanisms against numbers worked out by hand, and against their formulas written as loops."""

import math

import pytest
import torch

from policies.routing.balance import entropy, entropy_regulariser, gates, load_statistics, move_bias, sequence_loss


def test_entropy_by_hand_and_finite_with_its_gradient_where_a_score_vanishes():
    assert entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]])).tolist() == pytest.approx([math.log(4), 0])
    logits = torch.tensor([[-200.0, 0.0], [-200.0, -200.0]], requires_grad=True)
    both = entropy(gates(logits))
    both.sum().backward()
    assert torch.isfinite(both).all()
    assert torch.isfinite(logits.grad).all()


def regulariser(logits, top_k: int, bias=None) -> torch.Tensor:
    logits = torch.as_tensor(logits)
    return entropy_regulariser(logits, torch.zeros(logits.shape[1]) if bias is None else torch.tensor(bias), top_k)


def test_entropy_regulariser_by_hand():
    # The middle of scores ½ ± d is ½, a logit of 0; sigmoid(± log 3) is ¾ or ¼, and H(¾, ¼) = log 4 − ¾ log 3 = .5623.
    one = torch.tensor([[0.3 * math.log(3), -0.3 * math.log(3)]])
    assert regulariser(one, 1).item() == pytest.approx(0.693147 - 0.562335, abs=1e-6)
    assert regulariser(torch.cat([one, -one]), 1).item() == pytest.approx(0, abs=1e-6)  # either once
    sure = torch.tensor([[9.0, 9.0, -9.0, -9.0]])
    assert regulariser(sure, 2).item() == pytest.approx(math.log(4) - math.log(2))  # two do everything
    assert regulariser(torch.cat([sure, -sure]), 2).item() == pytest.approx(0, abs=1e-6)
    assert regulariser(sure, 4).item() == 0  # nothing to choose


def test_the_entropy_regulariser_looks_at_choices_with_their_bias():
    torch.manual_seed(0)
    logits, bias = torch.randn(4000, 8) * 0.3, [0.3] * 4 + [-0.3] * 4
    assert regulariser(logits, 4).item() < 1e-3
    assert regulariser(logits, 4, bias).item() > 0.5  # four experts do nearly everything


def test_the_gradient_of_the_entropy_regulariser_takes_from_the_busy_expert_what_was_near_a_tie():
    logits = torch.tensor([[0.2, 0.0, -9.0], [0.2, 0.0, -9.0], [5.0, -9.0, -9.0]], requires_grad=True)
    regulariser(logits, 1).backward()
    assert logits.grad[0, 0] > 1e-3
    assert logits.grad[0, 1] < -1e-3
    assert logits.grad[2].abs().max() < 1e-6  # a token that is sure stays where it is


@pytest.mark.parametrize("row", [[54.0, 0.0, 0.0], [0.0, -60.0, 0.1], [0.0, 0.0, 0.0]])
def test_the_gradient_of_the_entropy_regulariser_is_finite_where_an_expert_is_never_chosen(row):
    logits = torch.tensor([row] * 3, requires_grad=True)
    regulariser(logits, 1).backward()
    assert torch.isfinite(logits.grad).all()


def test_sequence_loss_is_the_formula_of_deepseek_v3():
    torch.manual_seed(0)
    logits, sequence, k = torch.randn(40, 6), torch.randint(4, (40,)), 2
    for number, loss in enumerate(sequence_loss(logits, sequence, 4, k)):
        rows = [row for row, s in zip(logits.sigmoid().tolist(), sequence.tolist(), strict=True) if s == number]
        expected = 0.0
        for e in range(6):
            f = 6 / (k * len(rows)) * sum(row[e] >= sorted(row)[-k] for row in rows)
            expected += f * sum(row[e] / sum(row) for row in rows) / len(rows)
        assert loss.item() == pytest.approx(expected)


def test_move_bias_by_hand():
    moved = move_bias(torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.tensor([9, 1, 2, 4]), rate=0.25)  # the mean is 4
    assert moved.tolist() == [0.25, 0.25, 0.25, 0.0]


def test_load_statistics_by_hand():
    # Layer 1: loads 2, 1, 1, 0 over an even share of 1. Layer 3: 2, 2, 6, 6 over 4 are .5, .5, 1.5, 1.5.
    counts = torch.tensor([[2, 1, 1, 0], [2, 2, 6, 6]])
    found = load_statistics(counts, torch.tensor([1.0, 0.5]), [1, 3])
    names = ("load_min", "load_max", "max_violation", "router_entropy", "dead_experts")
    assert [found.pop(f"moe/{name}") for name in names] == [0.25, 1.75, 0.75, 0.75, 1]
    assert [found.pop(f"moe/layer_1/{name}") for name in names] == [0, 2, 1, 1, 1]
    assert [found.pop(f"moe/layer_3/{name}") for name in names] == [0.5, 1.5, 0.5, 0.5, 0]
    assert found == {}

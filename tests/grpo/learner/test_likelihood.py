"""When a forward has gradients, who watches it, and which tokens tell how far a step has moved the policy."""

from contextlib import contextmanager

import pytest
import torch

from grpo.learner.batch import collate
from grpo.learner.likelihood import Likelihood
from grpo.learner.row import PackedRow, Sample

ROW = PackedRow([5, 6], [Sample(0, [7, 8]), Sample(1, [9])])


class Watcher:
    name = "watcher"

    def __init__(self) -> None:
        self.entered: list[str] = []

    @contextmanager
    def recording(self, policy):
        self.entered.append("recording")
        yield "record"

    @contextmanager
    def as_at_first(self):
        self.entered.append("as_at_first")
        yield


def test_a_forward_has_gradients_and_watchers_where_it_learns(micro_policy):
    policy, watcher = micro_policy(0), Watcher()
    likelihood = Likelihood(policy, watchers=[watcher])
    mini, spared = (collate([PackedRow([5, 6], ROW.samples, learns=learns)], policy.device) for learns in (True, False))
    forward = likelihood.forward(mini)
    logits = policy.trunk(torch.tensor([[5, 6, 7, 8]])).logits[0, 1:3]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor([[7], [8]]))[:, 0]  # the temperature is 1
    torch.testing.assert_close(forward.logprobs[0], expected, rtol=0, atol=1e-4)
    assert (forward.logprobs.requires_grad, forward.entropy.requires_grad) == (True, False)
    assert forward.records == {"watcher": "record"}
    assert not likelihood.forward(spared).logprobs.requires_grad
    watcher.entered.clear()
    with torch.no_grad():
        assert not likelihood.forward(mini).logprobs.requires_grad
    policy.add_lora(2, 4.0)
    likelihood.of_reference(mini)
    assert watcher.entered == ["as_at_first"]


def test_one_untied_completion_of_each_of_eight_groups_tells_how_far_a_step_has_moved(micro_policy):
    """All others have no log-probabilities here: reading one would raise."""
    likelihood = Likelihood(micro_policy(0))
    samples = [Sample(2 * i + j, [7 + i, 8], advantage=0.5 * j) for i in range(9) for j in (0, 1)]
    rows = [PackedRow([5, 6], samples[2 * i : 2 * i + 2], group=i + 1) for i in range(9)]
    tied = PackedRow([5], [Sample(99, [7])], group=0)
    with torch.no_grad():
        now = {i: likelihood.forward(collate([row], torch.device("cpu"))).logprobs[1] for i, row in enumerate(rows[:8])}
    before = {(2 * i + 1, 0): (logprobs - 0.1 * i).tolist() for i, logprobs in now.items()}
    by_hand = torch.arange(8) * 0.1  # log-ratios: each token has become so much likelier
    expected = (by_hand.exp() - 1 - by_hand).mean().item()
    assert likelihood.moved([tied, *rows], before) == pytest.approx(expected, abs=1e-5)

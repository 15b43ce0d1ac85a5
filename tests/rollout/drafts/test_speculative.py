"""Verification of drafts is counting the leading agreements, and nothing else."""

import torch

from rollout.drafts.speculative import confident_drafts, until_end, verify_draft


def test_by_hand():
    targets = torch.tensor([[5, 6, 7, 8]] * 5)
    drafts = torch.tensor(
        [
            [5, 6, 7],  # all
            [4, 6, 7],  # the first is wrong: later agreement does not count
            [5, 9, 7],
            [5, 6, 9],
            [6, 7, 8],  # right tokens, one place early
        ]
    )
    assert verify_draft(targets, drafts).tolist() == [3, 0, 1, 2, 0]


def test_where_rows_end_by_hand():
    """At a stop token that is kept, at the limit, or after the trunk's own token. One row has ended before."""
    targets = torch.tensor(
        [[5, 9, 2, 8], [5, 6, 2, 3], [5, 9, 2, 3], [6, 6, 6, 6], [5, 9, 2, 3], [3, 9, 2, 8], [5, 9, 3, 8]]
    )
    accepted, alive = torch.tensor([3, 3, 1, 3, 3, 2, 1]), torch.tensor([True, True, True, False, True, True, True])
    left, stops = torch.tensor([9, 9, 9, 9, 2, 9, 9]), torch.tensor([6, 3])
    lengths, stopped = until_end(targets, accepted, alive, left, stops)
    assert lengths.tolist() == [4, 2, 2, 0, 2, 1, 2]
    assert stopped.tolist() == [False, True, False, False, False, True, False]
    lengths, stopped = until_end(targets[:, :1], None, alive, 9, stops)
    assert lengths.tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert stopped.tolist() == [False] * 5 + [True, False]


def test_clear_drafts_by_hand():
    """The best is 4, .5 and 2 above the second; 2 nats are not more than 2."""
    logits = torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.5, 0.0], [3.0, 1.0, 0.0]])
    for temperature, clear in (
        (1.0, [True, False, False]),
        (0.0, [True, False, False]),
        (0.5, [True, False, True]),
        (torch.tensor([2.0, 0.2, 0.5]), [False, True, True]),
    ):
        assert confident_drafts(logits, temperature, margin=2.0).tolist() == clear

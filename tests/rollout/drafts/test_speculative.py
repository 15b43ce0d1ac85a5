"""Verification of drafts is counting the leading agreements, and nothing else."""

import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

import rollout.drafts.speculative
from rollout.drafts.speculative import verify_draft


def test_docstring_examples():
    assert doctest.testmod(rollout.drafts.speculative).failed == 0


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


def test_without_drafts_nothing_is_accepted():
    assert verify_draft(torch.tensor([[3], [4]]), torch.zeros(2, 0, dtype=torch.long)).tolist() == [0, 0]


@given(st.data())
def test_equals_a_loop(data):
    rows, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    token = st.integers(0, 2)  # so few that they often agree
    targets = data.draw(st.lists(st.lists(token, min_size=k + 1, max_size=k + 1), min_size=rows, max_size=rows))
    drafts = data.draw(st.lists(st.lists(token, min_size=k, max_size=k), min_size=rows, max_size=rows))
    expected = []
    for target, draft in zip(targets, drafts, strict=True):
        count = 0
        while count < k and draft[count] == target[count]:
            count += 1
        expected.append(count)
    accepted = verify_draft(torch.tensor(targets), torch.tensor(drafts))
    assert accepted.tolist() == expected
    for target, draft, count in zip(targets, drafts, expected, strict=True):
        # What is kept — the accepted drafts and the bonus token — are the target's own choices, every one.
        assert [*draft[:count], target[count]] == target[: count + 1]

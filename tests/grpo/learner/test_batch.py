import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.learner.batch import TrainingBatch, by_completion, collate, cut, micro_batches, split_rows
from grpo.learner.row import PackedRow, Sample
from policies.attention import Packing

CPU = torch.device("cpu")


def _row(prompt: list[int], *completions: list[int], start: int = 0) -> PackedRow:
    return PackedRow(prompt, [Sample(start + i, ids) for i, ids in enumerate(completions)])


def _row_of(prompt: int, lengths: list[int]) -> PackedRow:
    return _row([1] * prompt, *([2 + i] * length for i, length in enumerate(lengths)))  # all different


def test_a_packed_row_holds_its_prompt_once():
    mini = collate([_row([7, 8], [1, 2], [3])], CPU)
    assert mini.token_ids.tolist() == [[7, 8, 1, 2, 3]]
    assert mini.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert mini.segment.tolist() == [[0, 0, 1, 1, 2]]
    assert mini.before.tolist() == [[0, 0, 1, 2, 1]]  # the prompt's last token predicts both first tokens
    assert mini.scored.tolist() == [[False, False, True, True, True]]
    assert mini.mask.tolist() == [[True, True], [True, False]]
    assert Packing(mini.segment).visible[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second completion does not see the first
    ]
    # The MTP head has no entry for the first token: it combines a token with the state before it.
    assert mini.head_segment.tolist() == [[-1, 0, 1, 1, 2]]


def test_turns_are_counted_over_a_row_and_what_tools_wrote_is_in_none():
    samples = [Sample(0, [1, 2, 3, 4], sampled=[True, True, False, True]), Sample(1, [5], sampled=[False])]
    mini = collate([PackedRow([7], [*samples, Sample(2, [6, 8])])], CPU)
    assert mini.turn.tolist() == [[0, 1, 1, -1, 2, -1, 3, 3]]
    assert mini.segment.tolist() == [[0, 1, 1, 1, 1, 2, 3, 3]]
    assert mini.mask.int().tolist() == [[1, 1, 0, 1], [0] * 4, [1, 1, 0, 0]]


def test_padding_is_seen_by_nobody_and_sees_something():
    mini = collate([_row([7], [1]), _row([7, 8], [1, 2], [3])], CPU)
    assert mini.segment[0].tolist() == [0, 1, -1, -1, -1]
    assert not Packing(mini.segment).visible[0, :2, 2:].any()
    # An empty row of the softmax would be NaN, also in the head, which has no entry for a prompt of one token.
    assert Packing(mini.head_segment).visible.any(dim=-1).all()


def test_contract_1_masks_come_from_lengths_even_where_padding_equals_the_stop_token():
    pad = eos = 0  # what `collate` pads with
    mini = collate([_row([5, eos, 6], [4, eos], [eos]), _row([5], [9, 9, 9, pad])], CPU)
    assert mini.mask.sum(dim=1).tolist() == [2, 1, 4]
    assert mini.token_ids[mini.scored].tolist() == [4, eos, eos, 9, 9, 9, pad]


def test_values_travel_between_rows_and_completions():
    mini = collate([_row([7, 8], [1, 2], [3]), _row([9], [4, 5, 6])], CPU)
    flat = torch.arange(1.0, 7.0, requires_grad=True)
    by_completion = mini.by_completion(flat)
    assert by_completion.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    by_completion.sum().backward()
    assert flat.grad.tolist() == [1] * 6
    assert mini.padded([[1, 2], [3], [4, 5, 6]]).tolist() == by_completion.tolist()
    assert [sample.token_ids for sample in mini.samples] == [[1, 2], [3], [4, 5, 6]]


def test_rows_are_split_at_the_budget_in_order_and_a_long_completion_gets_its_own():
    samples = [Sample(i, [1] * length) for i, length in enumerate([3, 3, 9, 1])]
    rows = split_rows([5, 5], samples, max_tokens=8)
    assert [[sample.index for sample in row.samples] for row in rows] == [[0, 1], [2], [3]]
    assert [row.length for row in rows] == [8, 11, 3]
    assert len(split_rows([5, 5], samples, max_tokens=100)) == 1
    assert {row.group for row in [*rows, PackedRow([1], [])]} == {0}


def test_the_segments_of_a_completion_come_together_and_one_without_values_leaves_it_out():
    rows = [PackedRow([7], [Sample(4, [1], start=2)]), PackedRow([8], [Sample(4, [5, 6])]), _row([9], [1], start=5)]
    assert by_completion(rows, {(4, 0): [0.1, 0.2], (4, 2): [0.3]}) == {4: [0.1, 0.2, 0.3]}
    assert by_completion(rows, {(4, 0): [0.1, 0.2], (5, 0): [0.3]}) == {5: [0.3]}


def test_rows_from_which_the_draft_head_alone_learns_come_last_and_by_themselves():
    head, long, short = PackedRow([1], [Sample(0, [2])], learns=False), _row([1], [2, 3, 4]), _row([1], [2])
    assert list(cut([head, long, short], 99)) == [[short, long], [head]]
    assert list(cut([head, long, short], 7)) == [[short], [long], [head]]
    assert list(cut([long, short], 8)) == [[short, long]]
    assert [len(part) for part in cut([short] * 4, 4)] == [2, 2]
    assert collate([short], CPU).advantages.tolist() == [0.0]


def test_what_was_recorded_of_prompts_and_completions_stands_in_their_places():
    recorded = torch.tensor([3, 4])[:, None, None]
    rows = [PackedRow([7, 8], [Sample(0, [1]), Sample(1, [2, 3], routing=recorded)], recorded), _row([9], [1])]
    assert collate(rows, CPU).routing[..., 0, 0].tolist() == [[3, 4, -1, 3, 4], [-1] * 5]
    assert collate(rows[1:], CPU).routing is None
    rows.append(PackedRow([7, 8], [Sample(2, [1])], recorded.expand(2, 1, 2)))
    with pytest.raises(ValueError, match=r"routings of one step differ in \[routers, k\]: \[\[1, 1\], \[1, 2\]\]"):
        collate(rows, CPU)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=8
    ),
    budget=st.integers(1, 80),
)
def test_every_row_is_in_one_micro_batch_and_the_budget_holds(shapes, budget):
    rows = [_row_of(prompt, lengths) for prompt, lengths in shapes]
    minis = list(micro_batches(rows, budget, CPU))
    assert sorted(id(row) for mini in minis for row in mini.rows) == sorted(map(id, rows))
    for mini in minis:
        assert mini.token_ids.numel() <= budget or len(mini.rows) == 1
        assert mini.token_ids.shape[1] == max(row.length for row in mini.rows)
        assert int(mini.scored.sum()) == int(mini.mask.sum()) == sum(row.num_completion_tokens for row in mini.rows)


def test_a_batch_is_tied_where_no_advantage_is_left():
    tied, untied = PackedRow([1], [Sample(0, [2])]), PackedRow([1], [Sample(0, [2], advantage=-0.5)])
    assert tied.tied
    assert not untied.tied
    assert TrainingBatch([tied], torch.zeros(1, 1), 1, 1).all_tied
    assert not TrainingBatch([tied, untied], torch.zeros(2, 1), 2, 2).all_tied

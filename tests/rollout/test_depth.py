"""The depth controller: expected tokens over measured milliseconds, worked out by hand."""

import doctest
import json
import math
import random
from dataclasses import replace

import pytest

import rollout.costs
import rollout.depth
from rollout.depth import HEAD, CostTable, DepthController

TABLE = CostTable(rows=[1, 4], rounds=[[10.0, 12.0, 14.0], [20.0, 28.0, 41.0]])


def pick(controller: DepthController, rows: int, most: int) -> int:
    """What the head drafts, where nothing can be looked up."""
    return controller.choose(rows, most, {}, head=True)[0]


def test_docstring_examples():
    assert doctest.testmod(rollout.depth).failed == 0
    assert doctest.testmod(rollout.costs).failed == 0


@pytest.mark.parametrize(
    ("rows", "depth", "expected"),
    [(1, 0, 10), (1, 2, 14), (2, 0, 10 + 10 / 3), (3, 1, 12 + 32 / 3), (4, 2, 41), (9, 1, 28), (1, 3, math.inf)],
)
def test_costs_are_linear_between_what_was_measured(rows, depth, expected):
    assert TABLE.milliseconds(rows, depth) == pytest.approx(expected)


def test_a_depth_that_was_not_measured_at_many_rows_is_not_chosen_there():
    table = CostTable(rows=[1, 8], rounds=[[10.0, 10.1, 10.2], [10.0, 10.1]])
    controller = DepthController(table, 4)
    assert pick(controller, 1, 9) == 2
    assert pick(controller, 4, 9) == 1
    assert table.max_depth == 2


def test_the_depth_with_the_most_expected_tokens_a_millisecond_is_picked():
    """Before any draft every depth is believed to be accepted in 3 of 4 cases: 1, 1.75, 2.3125 tokens."""
    controller = DepthController(TABLE, 4)
    assert pick(controller, 1, 9) == 2  # .1, .1458, .1652 tokens a millisecond
    assert pick(controller, 4, 9) == 1  # .05, .0625, .0564
    assert pick(controller, 1, 1) == 1
    assert pick(controller, 1, 0) == 0


def test_what_earlier_steps_have_shown_is_believed_at_first():
    """1.5 and 1.6 tokens in 12 and 14 ms, .1 without drafts; 1.1 tokens are too few."""
    assert DepthController(TABLE, 4, (0.5, 0.2)).tokens(HEAD, 2) == pytest.approx([1, 1.5, 1.6])
    assert DepthController(TABLE, 4, (0.5,)).tokens(HEAD, 2) == pytest.approx([1, 1.5, 1.875])  # ¾ at depth 2
    assert pick(DepthController(TABLE, 4, (0.5, 0.2)), 1, 9) == 1
    assert pick(DepthController(TABLE, 4, (0.1,)), 1, 9) == 0
    controller = DepthController(TABLE, 1, (0.5, 0.2))
    assert controller.tokens(("siblings", 2), 1) == [1, 1.5]
    controller.observe(8, [1])
    assert controller.tokens(HEAD, 1) == [1, 1.25]  # (.5 · 4 + 1) of (4 + 8)


def test_a_draft_counts_where_all_before_it_were_accepted():
    """Of 100 rows 90 accept the first draft and 20 of those the second; 3 of 4 were believed to at each depth."""
    controller = DepthController(TABLE, 4)
    controller.observe(100, [90, 20])
    first, second = (3 + 90) / (4 + 100), (3 + 20) / (4 + 90)
    assert controller.tokens(HEAD, 2) == pytest.approx([1, 1 + first, 1 + first + first * second])


def test_what_the_drafts_have_shown_changes_the_depth():
    controller = DepthController(TABLE, 4)
    controller.observe(100, [90, 20])  # depth 2 is accepted in (3 + 20) of (4 + 90) cases after depth 1
    assert pick(controller, 1, 9) == 1  # 1.894 / 12 = .158 against (1.894 + .219) / 14 = .151
    controller.observe(400, [0, 0])
    assert pick(controller, 1, 9) == 0  # 93 of 504: 1.185 / 12 = .0987 against .1
    controller.observe(100_000, [100_000, 100_000])
    assert pick(controller, 4, 9) == 2  # 3 / 41 = .073 against 2 / 28 = .071


def test_a_compiled_round_has_one_of_a_few_depths_and_costs_of_its_own():
    """1, 1.75 and 2.734 tokens are expected of 0, 1 and 3 drafts before any is made."""
    graphs = [[1.0, 1.5, 9.0, 3.0], [2.0, 4.0, 9.0, 5.0]]
    table = replace(TABLE, rows=[1, 4, 16], rounds=[[10.0] * 9] * 3, graphs=graphs)
    controller = DepthController(table, 8)
    assert table.milliseconds(2, 1, by_graph=True) == pytest.approx(1.5 + 2.5 / 3)
    assert table.milliseconds(8, 1, by_graph=True) == 4.0
    assert controller.graph_speeds(1) == pytest.approx({0: 1.0, 1: 1.75 / 1.5, 3: 2.734375 / 3})
    assert controller.graph_speeds(4) == pytest.approx({0: 0.5, 1: 1.75 / 4, 3: 2.734375 / 5})
    controller.observe(1000, [0])
    assert controller.graph_speeds(1)[1] < 1
    assert list(DepthController(table, 1).graph_speeds(4)) == [0, 1]  # 3 are not to be drafted


def test_drafts_may_pay_where_they_would_if_all_rows_had_the_best_kind():
    """Of an unknown kind 1.5 and 1.75 tokens are expected, and of the head 1.75 and 2.3125. A fifth must be gained: a
    token may take 10 / 1.2 = 8.33 ms."""

    def pays(rounds, lookups=None, most=9, head=False) -> float:
        return DepthController(CostTable([1], [rounds], lookups and [lookups]), 4).may_save(1, most, head)

    assert not pays([10.0], [10.0, 12.6, 14.6])
    assert pays([10.0], [10.0, 12.4, 14.6]) == pytest.approx(10 - 12.4 / 1.5)
    assert pays([10.0], [10.0, 12.4, 14.0]) == pytest.approx(10 - 14 / 1.75)
    assert pays([10.0], [10.0, 12.6, 14.5])
    assert not pays([10.0], [10.0, 12.6, 14.5], most=1)  # no room for two
    assert pays([10.0, 14.5], head=True)
    assert not pays([10.0, 14.6], head=True)
    assert not pays([10.0, 14.5])
    controller = DepthController(CostTable([1], [[10.0]], [[10.0, 16.0]]), 4)
    assert not controller.may_save(1, 9, head=False)
    controller.observe(1000, [1000], ("siblings", 8))
    assert controller.may_save(1, 9, head=False)
    assert DepthController(None, 4).may_save(1, 9, head=False) == math.inf


def test_where_drafts_cannot_pay_none_is_chosen():
    made = random.Random(0)
    answers = []
    for _ in range(500):
        head, looked_up = ([10.0 + made.uniform(3, 12) * k for k in range(4)] for _ in range(2))
        controller = DepthController(CostTable([4], [head], [looked_up]), 3)
        for kind in (HEAD, ("siblings", 3)):
            controller.observe(1000, sorted((made.randint(0, 1000) for _ in range(3)), reverse=True), kind)
        has_head = made.random() < 0.5
        answers.append(controller.may_save(4, 3, has_head) > 0)
        if not answers[-1]:
            found = {("siblings", 3): made.randint(0, 4), ("history", 2): 0}
            assert controller.choose(4, 3, found, has_head)[:2] == (0, False)
    assert 20 < sum(answers) < 480


def test_equal_speeds_pick_the_shallower_depth():
    controller = DepthController(CostTable(rows=[1], rounds=[[1.0, 1.4, 1.85]]), 4)
    assert pick(controller, 1, 9) == 1  # 1.75 / 1.4 and 2.3125 / 1.85 are 1.25


def test_drafts_that_gain_less_than_a_fifth_are_not_made():
    """1.75 tokens of the head and 1.5 that were looked up are expected of one draft."""

    def choice(head, looked_up):
        controller = DepthController(CostTable([1], [[1.0, head]], [[1.0, looked_up]]), 1)
        return controller.choose(1, 9, {("siblings", 1): 1}, head=True)

    assert choice(1.45, 1.24) == (1, False, pytest.approx(1.5 / 1.24))  # 1.2097, and 1.2069 of the head
    assert choice(1.45, 1.26) == (1, True, pytest.approx(1.75 / 1.45))
    assert choice(1.46, 1.26) == (0, False, 1.0)  # 1.1905 and 1.1986


def test_the_table_is_read_back_and_a_broken_one_is_named(tmp_path):
    TABLE.save(tmp_path / "draft_costs.json")
    assert CostTable.load(tmp_path / "draft_costs.json") == TABLE
    looked_up = replace(TABLE, lookups=[[10.0, 10.5], [20.0, 22.0]])
    replace(TABLE, graphs=[[1.0, 2.0]]).save(tmp_path / "draft_costs.json")
    assert CostTable.load(tmp_path / "draft_costs.json") == replace(TABLE, graphs=[[1.0, 2.0]])
    replace(TABLE, reading=0.25).save(tmp_path / "draft_costs.json")
    assert CostTable.load(tmp_path / "draft_costs.json") == replace(TABLE, reading=0.25)
    looked_up.save(tmp_path / "draft_costs.json")
    assert CostTable.load(tmp_path / "draft_costs.json") == looked_up
    assert looked_up.milliseconds(1, 1, looked_up=True) == 10.5
    assert looked_up.milliseconds(1, 2, looked_up=True) == TABLE.milliseconds(1, 1, looked_up=True) == math.inf
    (tmp_path / "draft_costs.json").write_text('{"rows": [1], "rounds": [[1.0]], "lookups": [[-1.0]]}')
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        CostTable.load(tmp_path / "draft_costs.json")
    for reading in (-1.0, "0.5", math.inf):
        (tmp_path / "draft_costs.json").write_text(json.dumps({"rows": [1], "rounds": [[1.0]], "reading": reading}))
        with pytest.raises(ValueError, match="of reading must be 0 or more"):
            CostTable.load(tmp_path / "draft_costs.json")
    (tmp_path / "draft_costs.json").write_text('{"rows": [1], "rounds": [["1.0"]]}')
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        CostTable.load(tmp_path / "draft_costs.json")
    (tmp_path / "draft_costs.json").write_text('{"rows": [1], "rounds": [[1.0, 2.0]]}')  # of an older version
    assert CostTable.load(tmp_path / "draft_costs.json") == CostTable([1], [[1.0, 2.0]])
    (tmp_path / "draft_costs.json").write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match=r"draft_costs.json is no table of draft costs.*delete it"):
        CostTable.load(tmp_path / "draft_costs.json")

"""The depth controller: expected tokens over measured milliseconds, worked out by hand."""

import json
import math
from dataclasses import replace

import pytest

from rollout.cost_table import CostTable
from rollout.drafts.depth import DepthController

TABLE = CostTable(rows=[1, 4], rounds=[[10.0, 12.0, 14.0], [20.0, 28.0, 41.0]])


def pick(controller: DepthController, rows: int, most: int) -> int:
    return controller.choose(rows, most)[0]


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
    assert DepthController(TABLE, 4, (0.5, 0.2)).tokens(2) == pytest.approx([1, 1.5, 1.6])
    assert DepthController(TABLE, 4, (0.5,)).tokens(2) == pytest.approx([1, 1.5, 1.875])  # ¾ at depth 2
    assert pick(DepthController(TABLE, 4, (0.5, 0.2)), 1, 9) == 1
    assert pick(DepthController(TABLE, 4, (0.1,)), 1, 9) == 0
    controller = DepthController(TABLE, 1, (0.5, 0.2))
    assert controller.tokens(1) == [1, 1.5]
    controller.observe(8, [1])
    assert controller.tokens(1) == [1, 1.25]  # (.5 · 4 + 1) of (4 + 8)


def test_a_draft_counts_where_all_before_it_were_accepted():
    """Of 100 rows 90 accept the first draft and 20 of those the second; 3 of 4 were believed to at each depth."""
    controller = DepthController(TABLE, 4)
    controller.observe(100, [90, 20])
    first, second = (3 + 90) / (4 + 100), (3 + 20) / (4 + 90)
    assert controller.tokens(2) == pytest.approx([1, 1 + first, 1 + first + first * second])


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


def test_drafts_that_gain_less_than_a_fifth_are_not_made():
    """1.75 tokens are expected of one draft."""

    def choice(cost):
        return DepthController(CostTable([1], [[1.0, cost]]), 1).choose(1, 9)

    assert choice(1.45) == (1, pytest.approx(1.75 / 1.45))  # 1.2069
    assert choice(1.46) == (0, 1.0)  # 1.1986


BROKEN = [
    ({"rows": [1], "rounds": [[1.0]], "graphs": [[-1.0]]}, "must be above 0 and finite"),
    ({"rows": [1], "rounds": [["1.0"]]}, "must be above 0 and finite"),
    ({"rows": [1], "rounds": [[1.0]], "reading": -1.0}, "of reading must be 0 or more"),
    ({"rows": [1], "rounds": [[1.0]], "reading": "0.5"}, "of reading must be 0 or more"),
    ({"rows": [1], "rounds": [[1.0]], "reading": math.inf}, "of reading must be 0 or more"),
    ({"rows": [1]}, r"draft_costs.json is no table of draft costs.*delete it"),
]


def test_the_table_is_read_back_and_a_broken_one_is_named(tmp_path):
    file = tmp_path / "draft_costs.json"
    for change in ({}, {"graphs": [[1.0, 2.0]]}, {"reading": 0.25}):
        replace(TABLE, **change).save(file)
        assert CostTable.load(file) == replace(TABLE, **change)
    for content, words in BROKEN:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            CostTable.load(file)

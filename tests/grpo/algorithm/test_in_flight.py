"""What was sampled and not learned from yet, as the JSON of a checkpoint, and back."""

import json
from dataclasses import replace

import torch

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.algorithm.in_flight import drawn_of, plain
from rewards.episode import ToolStats
from rewards.group_score import GroupScore, RewardFailure
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup, Segment

EXPERTS = torch.tensor([[[1, 3]], [[-1, -1]]], dtype=torch.int8)
PROMPT = Prompt("p", "2 + 3 = ?", [5, 6], {"answer": "5"}, [{"role": "user", "content": "2 + 3 = ?"}])


def test_contract_9_what_is_in_flight_comes_back_from_a_checkpoint():
    """Of the prompt what an environment has added comes back, and its columns are those of the data."""
    tools = ToolStats(2, 1, reward=0.5, failure={"kind": "died", "message": "m"})
    one = Completion([8, 9], [-0.5, 0.0], "ab", "length", 3, DraftStats(1, [2], [1]), EXPERTS, [{"role": "tool"}])
    other = Completion([7], [-1.0], "c", "stop", 3, tools=tools, sampled=[True], segments=[Segment(1, [4])])
    prompt = replace(PROMPT, text="2 + 3 = ? Use the tool.", token_ids=[5, 6, 7])
    groups = [RolloutGroup(prompt, [one, other], EXPERTS), RolloutGroup(PROMPT, [])]
    scores = [GroupScore([1.0, None], {"r": [1.0, None]}, [RewardFailure("r", "p", 1, "nan", "returned nan")])]
    drawn = Drawn(groups[:1], scores, [0], [(groups[1], GroupScore([], {}))], 1, {"time/sample": 0.5})
    record = json.loads(json.dumps(plain(drawn)))
    assert drawn_of(record, {"p": PROMPT}.__getitem__) == drawn
    [group] = drawn_of(record, {"p": PROMPT}.__getitem__).groups
    for routing in (group.prompt_routing, group.completions[0].routing):
        assert routing.dtype == torch.int8
        assert routing.tolist() == EXPERTS.tolist()
    del record["groups"][0]["completions"][0]["draft"]["cost"], record["groups"][0]["completions"][0]["segments"]
    record["groups"][0]["completions"][0]["draft"]["no_longer_there"] = 1
    record["metrics"]["group/tied"] = 0.5
    drawn.metrics["group/zero_variance"] = 0.5
    assert drawn_of(record, {"p": PROMPT}.__getitem__) == drawn, "a checkpoint of an older version"


def test_contract_9_numbers_that_are_not_finite_keep_no_checkpoint_from_being_made():
    """A reward may log them; JSON has no word for them."""
    nan, inf = float("nan"), float("inf")
    score = GroupScore([1.0], {"r": [1.0]}, extras={"a": [nan], "b": [1.0]}, metrics={"m": -inf})
    drawn = Drawn([RolloutGroup(PROMPT, [])], [score], [0], metrics={"n": inf, "o": 0.5})
    record = json.loads(json.dumps(plain(drawn), allow_nan=False))
    found = drawn_of(record, {"p": PROMPT}.__getitem__)
    assert str(found.scores[0].extras) == "{'a': [nan], 'b': [1.0]}"
    assert (found.scores[0].metrics, found.metrics) == ({"m": -inf}, {"n": inf, "o": 0.5})

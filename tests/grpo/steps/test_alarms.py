"""What the alarms see of a run: the policy's answers and tokens, and nothing that tools wrote."""

from types import SimpleNamespace

import pytest

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.steps.alarms import AlarmCallback
from review.findings.alarms import WINDOW
from rewards.episode import ToolStats
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

OUTPUT = [9] * 40  # tokens of a tool, which repeats itself


def episode(answer, outputs, own):
    """A call, what the tool wrote so many times, and the answer; `own` are the policy's tokens."""
    turns = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "name": "search", "content": "#### 42 42 42"},
        {"role": "assistant", "content": answer},
    ]
    written = OUTPUT * outputs
    ids, sampled = [*own, *written], [True] * len(own) + [False] * len(written)
    text = f"call #### 42 42 42 {answer} >> #### 42"  # the tool has the last word
    return Completion(ids, [0.0] * len(ids), text, "stop", 0, turns=turns, sampled=sampled, tools=ToolStats())


def drawn(groups, marks):
    prompts = [Prompt(f"p{i}", "?", [1], {"question": "6 * 7?", "answer": "#### 42"}) for i in range(len(groups))]
    rollouts = [RolloutGroup(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    return Drawn(rollouts, [GroupScore(values, {"mine": values}) for values in marks])


def callback():
    said = []
    return AlarmCallback(["mine"], lambda name, **event: said.append(event["unshown"]["kind"])), said


def test_the_output_of_a_tool_is_neither_length_nor_repetition():
    """Completions with the reward called a tool that wrote much; what the policy wrote does not differ in length."""
    watch, said = callback()
    own = [[sample + 8 * i for i in range(5)] for sample in range(8)]
    groups = [[episode("so #### 42", sample % 4, own[sample]) for sample in range(8)] for _ in range(4)]
    marks = [[sample % 4 / 4 for sample in range(8)] for _ in range(4)]
    for step in range(1, 2 * WINDOW):
        values = watch.on_update_begin(step, drawn(groups, marks), None)
        assert "alarm/length/mine" not in values
        assert "alarm/repetition/mine" not in values
    assert "length-rewarded" not in said
    assert "repetition-rewarded" not in said


@pytest.mark.parametrize(("answer", "right"), [("so #### 42", 1.0), ("so #### 41", 0.0)])
def test_the_number_of_a_tool_is_not_the_answer(answer, right):
    seen = []
    watch, _ = callback()
    watch.alarms = SimpleNamespace(evaluated=lambda accuracy, completions: seen.append(accuracy) or [])
    result = SimpleNamespace(groups=drawn([[episode(answer, 1, [1, 2])]], [[0.0]]).groups, accuracy=None, completions=1)
    watch.on_evaluate(0, {"sampled": result})
    assert seen == [right]


def test_a_hacked_length_of_the_policys_own_turns_is_named():
    watch, said = callback()
    for step in range(1, WINDOW + 1):
        groups = [[episode(f"#### {s}", 3 - s % 4, list(range(s + 1))) for s in range(8)] for _ in range(4)]
        watch.on_update_begin(step, drawn(groups, [[s / 8 for s in range(8)]] * 4), None)
    assert said == ["length-rewarded"]

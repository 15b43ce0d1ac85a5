"""Steps without anything to learn from: the user is told why, once, and what to change."""

import json
from types import SimpleNamespace

import pytest

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.learner.row import Sample
from grpo.steps.zero_variance_steps import OPENING, STEPS, ZeroVarianceSteps
from grpo.train import train
from rewards.group_score import GroupScore
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup


@pytest.fixture
def observe(micro_config, tmp_path):
    """`observe([[rewards of a group], ...] of each step, **options)`: what is told after each step."""

    def run(steps, tied=None, reason="stop", text="x", **options):
        config = micro_config(tmp_path, **options)
        task = SimpleNamespace(first_reward="gsm8k", max_score=1.0)
        callback = ZeroVarianceSteps(SimpleNamespace(config=config), task)
        told = []
        for groups in steps:
            completion = Completion([1], [0.0], text, reason, 0, DraftStats())
            drawn = Drawn(
                [
                    RolloutGroup(Prompt("p", "p", [1], {"answer": "20 + 22 = #### 42"}), [completion] * len(rewards))
                    for rewards in groups
                ],
                [GroupScore(rewards, {"gsm8k": rewards}) for rewards in groups],
            )
            differ = any(len({r for r in rewards if r is not None}) > 1 for rewards in groups)
            told.append(callback.observe(drawn, not differ if tied is None else tied))
        return told

    return run


RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


TEACHES, TIED = [MIXED], [RIGHT, RIGHT]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([TIED] * (2 * STEPS + 1), [OPENING]),  # after the first two, and once
        ([TEACHES] + [TIED] * (2 * STEPS + 1), [1 + STEPS]),  # later it takes five
        ([[WRONG]] * 3 + [TEACHES] + [TIED] * 2 * STEPS, [OPENING, 4 + STEPS]),
        ([TEACHES] + [TIED] * (STEPS - 1) + [[RIGHT, MIXED]] + [TIED] * STEPS, [1 + 2 * STEPS]),  # counted anew
        ([TEACHES] + [TIED] * (STEPS - 1), []),
    ],
)
def test_a_standstill_is_said_once_and_sooner_at_the_start(observe, steps, said):
    assert [i for i, words in enumerate(observe(steps), start=1) if words] == said


@pytest.mark.parametrize(
    ("groups", "given", "why", "ways", "others"),
    [
        (
            [RIGHT, RIGHT],
            {},
            "every completion got full marks: the problems are too easy for this policy",
            [
                "harder problems: data.name or data.task_options (now word_problems)",
                *("rollout.temperature (now 1)", "rollout.group_size (now 4)", "rollout.max_resamples (now 0)"),
            ],
            ["warm"],
        ),
        (
            [RIGHT, WRONG],
            {},
            "inside each group all completions got the same",
            ["leave out problems", "rollout.temperature", "rollout.group_size", "rollout.max_resamples"],
            ["cut at"],
        ),
        ([[None, None]], {}, "no completion has a score: the rewards abstained or failed", ["quartet reward test"], []),
        ([MIXED], {"tied": True}, "left out of the loss", ["rollout.max_completion_tokens"], []),
    ],
)
def test_what_was_scored_says_why_and_what_to_change(observe, groups, given, why, ways, others):
    said, change = observe([groups] * STEPS, **given)[OPENING - 1 if not given else STEPS - 1]
    assert why in said
    for way in ways:
        assert way in "; ".join(change)
    assert not [word for word in others if word in "; ".join([said, *change])]


@pytest.mark.parametrize("value", [0.0, -1.0, 0.1])
def test_no_marks_ask_for_an_sft_stage_and_easier_problems(observe, value):
    why, change = observe([[[value, value]] * 2] * OPENING, reason="length")[-1]
    assert why.startswith(f"every completion got the same reward, {value:g}: the policy never does better")
    assert "100% of them were cut at rollout.max_completion_tokens=10" in why
    for way in (
        *("sft.steps (now 3)", "rollout.group_size (now 4)", "curriculum.shortest_share", "quartet reward"),
        *("rollout.temperature (now 1)", "rollout.max_resamples (now 0)"),
    ):
        assert way in "; ".join(change)
    assert change[0].startswith("let completions end: raise rollout.max_completion_tokens (now 10)")
    assert "harder" not in "; ".join(change)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_random_weights_without_an_sft_stage_are_the_first_reason(observe, reason):
    told = observe([[WRONG, WRONG]] * OPENING, reason=reason, text="is 42", model="tiny", **{"sft.steps": 0})
    why, change = told[-1]
    assert why.startswith("every completion got the same reward, 0: the weights of the preset 'tiny' are random")
    assert ("cut at" in why) == (reason == "length")
    assert "sft.steps: 300 (now 0)" in change[0]
    assert "model (now tiny)" in change[1]
    assert "random" not in observe([[WRONG]] * OPENING, model="tiny")[-1][0]  # it had an SFT stage
    assert "random" not in observe([[RIGHT]] * OPENING, model="tiny", **{"sft.steps": 0})[-1][0]


@pytest.mark.parametrize(("text", "read"), [("So it is 42.", True), ("**42**", True), ("142", False), ("42 x", False)])
def test_answers_in_a_form_that_the_reward_does_not_read_are_counted(observe, text, read):
    why, change = observe([[WRONG, WRONG]] * OPENING, text=text)[-1]
    assert ("8 of 8 completions end with the reference answer" in why) == read
    assert ("quartet reward test" in change[0]) == read


@pytest.mark.parametrize(("first", "teaches", "expected"), [(41, None, [40 + STEPS]), (1, 4, [OPENING, 4 + STEPS])])
def test_a_resumed_run_is_not_at_its_start(micro_config, tmp_path, first, teaches, expected):
    """And one that began badly is told of a later standstill."""
    said = []
    log = SimpleNamespace(nothing_learned=lambda step, *_: said.append(step))
    task = SimpleNamespace(first_reward="gsm8k", max_score=1.0)
    callback = ZeroVarianceSteps(SimpleNamespace(config=micro_config(tmp_path), log=log), task)
    for step in range(first, first + 19):
        callback.on_update_begin(step, Drawn([], []), SimpleNamespace(all_tied=step != teaches))
    assert said == expected


@pytest.mark.parametrize(
    ("sample", "tied"),
    [
        (Sample(0, [1, 2], advantage=0.5), False),
        (Sample(0, [1, 2], token_advantages=[0.0, 0.5]), False),
        (Sample(0, [1, 2], token_advantages=[0.0, 0.0]), True),
        (Sample(0, [1, 2], advantage=0.5, finish_reason="length", in_loss=False), True),
    ],
)
def test_a_sample_with_an_advantage_in_the_loss_is_something_to_learn_from(sample, tied):
    assert sample.tied == tied


def test_what_a_teacher_teaches_has_no_advantages_and_is_no_tied_step(micro_config, tmp_path):
    config = micro_config(tmp_path, **{"loss.advantage": "distill", "distill.teacher": "tiny"})
    callback = ZeroVarianceSteps(SimpleNamespace(config=config), SimpleNamespace(first_reward="gsm8k", max_score=1.0))
    batch = SimpleNamespace(all_tied=True)
    assert [callback.on_update_begin(step, None, batch) for step in range(STEPS + 1)] == [{}] * (STEPS + 1)
    assert not callback.in_a_row


def test_a_run_says_it_in_a_line_and_an_event(micro_config, tmp_path, capsys):
    path = tmp_path / "never.py"
    path.write_text("def never(completions, **_):\n    return [0.0] * len(completions)\n")
    options = {"steps": OPENING + 1, "sft.steps": 0, "prompts_per_step": 2, "data.template": "{question}"}
    train(micro_config(tmp_path / "r", **options, rewards=[{"function": f"{path}:never"}]))
    events = [json.loads(line) for line in (tmp_path / "r/events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "nothing_learned"]
    assert event["step"] == OPENING
    assert event["why"].startswith("every completion got the same reward, 0: ")
    shown = capsys.readouterr().out
    assert shown.count("nothing_learned") == 1
    assert "what may help: train it on reference solutions first: sft.steps: 300 (now 0)" in shown
    assert "characters ..." not in shown.split("nothing_learned")[1].split("step ")[0]  # nothing is cut
    assert len(event["change"]) == 2

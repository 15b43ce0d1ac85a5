import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from torch import nn

from grpo.config.run import TrainConfig
from grpo.data.prompts import PromptStream
from grpo.learner.optimizer import ramp
from grpo.learner.parallel import ALONE
from grpo.run.records import read_metrics
from grpo.steps.collector import Collector
from grpo.steps.curriculum import MOST_WEIGHED, Curriculum, learnability
from grpo.steps.loop import Run
from grpo.steps.pool import sampling_of_steps
from grpo.task.task import Task
from grpo.train import train
from rewards.data.examples import Example
from rewards.group_score import GroupScore, RewardFailure
from rewards.records import read_rollouts
from rewards.verdicts import Verdicts
from rollout.group import Completion, Prompt, RolloutGroup

# Ten examples; the solution of example i has (7 i mod 10) + 1 letters, so their order by length is another one.
EXAMPLES = [Example(str(i), f"{i} = ?", "x" * (7 * i % 10 + 1)) for i in range(10)]
BY_LENGTH = [str(i) for i in (0, 3, 6, 9, 2, 5, 8, 1, 4, 7)]


def _config(seed=0, **curriculum) -> TrainConfig:
    return TrainConfig(output_dir="unused", seed=seed, curriculum=curriculum)


def _curriculum(examples, config, pass_rate=lambda score: None) -> Curriculum:
    return Curriculum(SimpleNamespace(config=config), SimpleNamespace(unsolved=examples, pass_rate=pass_rate))


def _collector(examples, config) -> Collector:
    """What takes prompts as the curriculum says, or in the order of the data."""
    task = SimpleNamespace(
        train=examples,
        unsolved=examples,
        prompt=lambda example, tokenizer: Prompt(example.example_id, "", [1]),
        actor=SimpleNamespace(environment=None),
    )
    policy = SimpleNamespace(tokenizer=None, mtp=None, stop_token_ids=[], backend="native", trunk=nn.Module())
    run = Run(config, None, ALONE, saved=None, last=9)
    stream, listeners = PromptStream(examples, config.seed), [_curriculum(examples, config)]
    return Collector(run, task, policy, sampling_of_steps(run, task, policy), stream, listeners)


def _ids(examples) -> list[str]:
    return [example.example_id for example in examples]


def test_a_ramp_is_straight_and_then_flat():
    assert [ramp(step, 5, 2, 10) for step in range(1, 8)] == [2, 4, 6, 8, 10, 10, 10]
    assert ramp(1, 1, 2, 10) == 10


def test_without_options_it_is_the_shuffled_stream():
    collector, stream = _collector(EXAMPLES, _config(seed=3)), PromptStream(EXAMPLES, 3)
    for step in range(1, 8):
        assert [prompt.prompt_id for prompt in collector.prompts(4, step)] == _ids(stream.take(4))
    [curriculum] = collector.listeners
    curriculum.record([("0", 1.0)])
    assert curriculum.metrics(7) == {}


def test_short_ones_come_first_and_longer_ones_as_they_open():
    curriculum = _curriculum(EXAMPLES, _config(steps=5, shortest_share=0.2))
    assert set(_ids(curriculum.choose(2, 1))) == set(BY_LENGTH[:2])
    assert set(_ids(curriculum.choose(2, 2))) == set(BY_LENGTH[2:4])  # 0.4 is open: the two that nobody has seen
    assert set(_ids(curriculum.choose(2, 3))) == set(BY_LENGTH[4:6])
    assert curriculum.metrics(3) == {"curriculum/open": 0.6, "curriculum/seen": 0.6}
    assert set(_ids(curriculum.choose(4, 5))) == set(BY_LENGTH[6:])
    again = [_ids(curriculum.choose(5, step)) for step in (6, 7)]
    assert sorted(again[0] + again[1]) == sorted(BY_LENGTH)  # nobody a third time before everybody was there twice


def test_a_step_is_filled_even_where_too_few_are_open():
    curriculum = _curriculum(EXAMPLES, _config(steps=9, shortest_share=0.1))
    assert set(_ids(curriculum.choose(4, 1))) == set(BY_LENGTH[:4])
    with pytest.raises(ValueError, match="cannot take 11 different prompts from 10 examples"):
        curriculum.choose(11, 1)


def test_a_running_pass_rate_and_its_weight():
    curriculum = _curriculum(EXAMPLES, _config(by_difficulty=True))
    curriculum.record([("4", 1.0), ("5", 0.0)])
    curriculum.record([("4", 0.5)])
    curriculum.record([("4", 0.25)])
    assert curriculum.pass_rates == {"4": 0.5, "5": 0.0}  # ((1 + 0.5) / 2 + 0.25) / 2
    assert [learnability(rate) for rate in (0.5, 0.25, 0.0, 1.0)] == [0.25, 0.1875, 0.01, 0.01]
    assert curriculum.metrics(1)["curriculum/pass_rate"] == 0.25


def _pass_rates(*scores: GroupScore, full_marks: float = 1.0) -> dict[str, float]:
    """What a curriculum has recorded after one step in which the groups of its prompts got these scores."""
    task = SimpleNamespace(first_reward="r", verdicts=Verdicts("r", "undeclared", gold=full_marks))
    curriculum = _curriculum(EXAMPLES, _config(shortest_share=0.5, by_difficulty=True), partial(Task.pass_rate, task))
    groups = [RolloutGroup(Prompt(EXAMPLES[i].example_id, "", [1]), []) for i in range(len(scores))]
    curriculum.sampled(1, groups, scores)
    return curriculum.pass_rates


def test_a_mark_that_differs_from_full_marks_by_rounding_alone_passes():
    """As for a tie: 0.7 + 0.2 + 0.1 is 1, and 1.1 + 2.2 is 3.3, though floats say otherwise."""
    tenths, sums = 0.7 + 0.2 + 0.1, 1.1 + 2.2
    assert (tenths < 1.0, sums > 3.3) == (True, True)
    assert _pass_rates(GroupScore([tenths, 1.0], {"r": [tenths, 1.0]})) == {"0": 1.0}
    assert _pass_rates(GroupScore([3.3, sums], {"r": [3.3, sums]}), full_marks=sums) == {"0": 1.0}
    assert _pass_rates(GroupScore([0.999, 1.0], {"r": [0.999, 1.0]})) == {"0": 0.5}


def test_contract_6_a_mark_that_is_missing_is_no_failure_to_pass():
    """Abstained, dropped, failed with a substitute: none of them says that a prompt is hard."""

    def failed(sample: int, function: str = "r") -> RewardFailure:
        return RewardFailure(function, "", sample, "raised", "")

    assert _pass_rates(GroupScore([1.0, None, None, 0.0], {"r": [1.0, None, None, 0.0]})) == {"0": 0.5}
    assert _pass_rates(GroupScore([None, 1.0], {"r": [None, 1.0]}, [failed(0)])) == {"0": 1.0}
    assert _pass_rates(GroupScore([-1.0, 1.0], {"r": [-1.0, 1.0]}, [failed(0)])) == {"0": 1.0}
    other = GroupScore([-1.0, 1.0], {"r": [0.0, 1.0], "other": [-1.0, 0.0]}, [failed(0, "other")])
    assert _pass_rates(other) == {"0": 0.5}
    # Without any mark there is nothing to record: the prompt counts as unseen.
    unmarked = GroupScore([None, None], {"r": [None, None]}, [failed(0), failed(1)], dropped=True)
    assert _pass_rates(unmarked, GroupScore([0.0, 1.0], {"r": [0.0, 1.0]})) == {"1": 0.5}


def test_learnable_prompts_are_drawn_in_proportion_to_what_they_teach():
    """One draw at a time: P(i) = w_i / Σ w, here .25 for two prompts and .01 for eight."""
    curriculum = _curriculum(EXAMPLES, _config(by_difficulty=True, seed=1))
    curriculum.record([(e.example_id, 0.5 if e.example_id in "27" else float(int(e.example_id) % 2)) for e in EXAMPLES])
    drawn = Counter(_ids(example for step in range(4000) for example in curriculum.choose(1, step)))
    assert sum(drawn.values()) == 4000
    for example in EXAMPLES:
        expected = 4000 * (0.25 if example.example_id in "27" else 0.01) / 0.58
        assert drawn[example.example_id] == pytest.approx(expected, abs=4 * expected**0.5)


def test_a_prompt_that_was_never_drawn_counts_as_its_words_let_expect():
    """Seen: one prompt with p(1−p) = .25 and three with .01; the other six share "=" and "?" with them, and "= ?"."""
    curriculum = _curriculum(EXAMPLES, _config(by_difficulty=True, seed=1))
    curriculum.record([("0", 0.5), ("1", 0.0), ("2", 0.0), ("3", 0.0)])
    unseen = learnability(curriculum.model.predict("4 = ?"))
    assert 0.1 < unseen < 0.25  # unlike the mean of the seen, .07
    drawn = Counter(_ids(example for step in range(4000) for example in curriculum.choose(1, step)))
    for example in EXAMPLES:
        weight = {"0": 0.25, "1": 0.01, "2": 0.01, "3": 0.01}.get(example.example_id, unseen)
        expected = 4000 * weight / (0.28 + 6 * unseen)
        assert drawn[example.example_id] == pytest.approx(expected, abs=4 * expected**0.5)


def test_of_many_examples_some_are_weighed():
    many = [Example(str(i), f"{i} = ?", "x") for i in range(MOST_WEIGHED + 500)]
    curriculum = _curriculum(many, _config(by_difficulty=True))
    chosen = _ids(curriculum.choose(MOST_WEIGHED, 1))
    assert len(set(chosen)) == MOST_WEIGHED
    assert not set(chosen) <= {example.example_id for example in many[:MOST_WEIGHED]}
    assert len(set(_ids(curriculum.choose(MOST_WEIGHED + 100, 2)))) == MOST_WEIGHED + 100


def test_draws_within_a_step_differ_and_hold_no_example_twice():
    curriculum = _curriculum(EXAMPLES, _config(by_difficulty=True))
    draws = [tuple(_ids(curriculum.choose(5, 1, draw))) for draw in range(6)]
    assert len(set(draws)) == 6
    assert all(len(set(draw)) == 5 for draw in draws)


@pytest.mark.parametrize(
    "options", [{}, {"by_difficulty": True}, {"shortest_share": 0.3}, {"shortest_share": 0.3, "by_difficulty": True}]
)
def test_contract_9_the_state_goes_through_json_and_resumes(options):
    config = _config(seed=2, steps=6, **options)

    def steps(collector, first, last):
        taken = []
        [curriculum] = collector.listeners
        for step in range(first, last + 1):
            prompt_ids = [prompt.prompt_id for prompt in collector.prompts(4, step)]
            curriculum.record((prompt_id, int(prompt_id) * step % 5 / 4) for prompt_id in prompt_ids)
            taken.append(prompt_ids)
        return taken

    whole, first, second = (_collector(EXAMPLES, config) for _ in range(3))
    expected = steps(whole, 1, 9)
    begun = steps(first, 1, 4)
    state = first.state_dict()
    written = json.dumps(state)
    second.load_state_dict(json.loads(written))
    assert begun + steps(second, 5, 9) == expected
    assert second.state_dict() == whole.state_dict()
    steps(first, 5, 9)
    assert json.dumps(state) == written  # what was handed out is a copy
    first.load_state_dict(state)
    assert steps(first, 5, 9) == expected[4:]


def test_a_state_of_other_data_is_refused():
    config = _config(by_difficulty=True)
    state = _collector(EXAMPLES, config).state_dict()
    with pytest.raises(ValueError, match="the training data have changed since the checkpoint"):
        _collector(EXAMPLES[1:], config).load_state_dict(state)


def test_a_run_with_every_curriculum(micro_config, tmp_path):
    (tmp_path / "long.py").write_text(
        "def long(completions, **_):\n    return [float(sum(map(str.isalpha, text)) >= 12) for text in completions]\n"
    )
    given = {
        "rewards": [{"function": f"{tmp_path}/long.py:long"}],
        "curriculum.steps": 3,
        "curriculum.shortest_share": 0.3,
        "curriculum.by_difficulty": True,
        "mtp.every": 1,
    }
    config = micro_config(tmp_path / "r", **given)
    with Task.of(config) as task:
        curriculum_examples = task.train
    train(config)
    lines = read_metrics(tmp_path / "r")
    assert [line["curriculum/open"] for line in lines] == pytest.approx([8 / 24, 16 / 24, 1])
    rates: dict[str, float] = {}
    for step in (1, 2, 3):
        rollouts = read_rollouts(tmp_path / "r", step)
        for group in (rollouts[i : i + 4] for i in range(0, 16, 4)):
            passed, name = sum(line["reward"] >= 1 for line in group) / 4, group[0]["prompt_id"]
            rates[name] = 0.5 * (rates.get(name, passed) + passed)
        assert lines[step - 1]["curriculum/pass_rate"] == pytest.approx(sum(rates.values()) / len(rates))
    assert sum(rates.values()) > 0
    opened = sorted(len(example.solution) for example in curriculum_examples)[:8]
    drawn = {line["prompt_id"] for line in read_rollouts(tmp_path / "r", 1)}
    lengths = [len(e.solution) for e in curriculum_examples if e.example_id in drawn]
    assert len(lengths) == 4
    assert max(lengths) <= max(opened)


# ---- candidates: one completion first -------------------------------------------------------------------------------


def _sampled(sure: dict[str, float]):
    """Samples one completion a prompt: two tokens that share its log-probability."""

    def sample(prompts):
        of = [Completion([1, 2], [sure[p.prompt_id] / 2] * 2, "", "stop", 0) for p in prompts]
        return [RolloutGroup(prompt, [completion]) for prompt, completion in zip(prompts, of, strict=True)]

    return sample


def test_the_prompts_that_the_policy_is_least_sure_of_are_used():
    """In the order in which they were drawn; the first of equals."""
    curriculum = _curriculum(EXAMPLES, _config(candidates=3))
    prompts = [Prompt(str(i), "", [1]) for i in range(6)]
    sample = _sampled({"0": -0.1, "1": -2.0, "2": -0.5, "3": -3.0, "4": -0.5, "5": 0.0})
    assert [prompt.prompt_id for prompt in curriculum.narrow(prompts, 2, sample)] == ["1", "3"]
    assert [prompt.prompt_id for prompt in curriculum.narrow(prompts, 3, sample)] == ["1", "2", "3"]
    assert curriculum.metrics(1) == {"curriculum/candidates": 12.0, "curriculum/candidate_tokens": 24.0}
    curriculum.begins(2)
    assert curriculum.metrics(2) == {"curriculum/candidates": 0.0, "curriculum/candidate_tokens": 0.0}


def test_a_completion_to_choose_by_has_noise_that_no_group_has():
    collector = _collector(EXAMPLES, _config(candidates=3))
    asked = []

    def sample(prompts, params, on_finished):
        asked.append((len(prompts), params.group_size, params.step, params.draw))
        return _sampled({prompt.prompt_id: -float(prompt.prompt_id) for prompt in prompts})(prompts)

    collector.sample = sample
    assert len(collector.prompts(2, step=5)) == 2
    assert len(collector.prompts(3, step=5, draw=1)) == 3
    assert asked == [(6, 1, 5, -1), (9, 1, 5, -2)]
    assert len(collector.prompts(8, step=6)) == 8  # of ten: there are no more


def test_candidates_are_of_the_problems_that_are_open():
    """Two of ten are open; of six candidates for two prompts the others would be long ones."""
    curriculum = _curriculum(EXAMPLES, _config(candidates=3, steps=100, shortest_share=0.2))
    assert curriculum.candidates(2, step=1) == 2
    assert curriculum.candidates(1, step=1) == 2
    assert curriculum.candidates(2, step=100) == 6


def test_without_candidates_nothing_is_sampled_first():
    collector = _collector(EXAMPLES, _config())
    collector.sample = None
    assert len(collector.prompts(2, step=1)) == 2

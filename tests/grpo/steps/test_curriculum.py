import json
from types import SimpleNamespace

import pytest
from torch import nn

from grpo.config.run import TrainConfig
from grpo.data.prompts import PromptStream
from grpo.learner.parallel import ONE_PROCESS
from grpo.steps.collector import Collector
from grpo.steps.curriculum import Curriculum
from grpo.steps.loop import Run
from grpo.steps.pool import sampling_of_steps
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.data.examples import Example
from rewards.records import read_rollouts
from rollout.group import Prompt

# Ten examples; the solution of example i has (7 i mod 10) + 1 letters, so their order by length is another one.
EXAMPLES = [Example(str(i), f"{i} = ?", "x" * (7 * i % 10 + 1)) for i in range(10)]
BY_LENGTH = [str(i) for i in (0, 3, 6, 9, 2, 5, 8, 1, 4, 7)]


def _config(seed=0, **curriculum) -> TrainConfig:
    return TrainConfig(output_dir="unused", seed=seed, curriculum=curriculum)


def _curriculum(examples, config) -> Curriculum:
    return Curriculum(SimpleNamespace(config=config), SimpleNamespace(unsolved=examples))


def _collector(examples, config) -> Collector:
    """What takes prompts as the curriculum says, or in the order of the data."""
    task = SimpleNamespace(
        train=examples,
        unsolved=examples,
        prompt=lambda example, tokenizer: Prompt(example.example_id, "", [1]),
        actor=SimpleNamespace(environment=None),
    )
    policy = SimpleNamespace(tokenizer=None, mtp=None, stop_token_ids=[], backend="native", trunk=nn.Module())
    run = Run(config, None, ONE_PROCESS, saved=None, last=9)
    stream, callbacks = PromptStream(examples, config.seed), [_curriculum(examples, config)]
    return Collector(run, task, policy, sampling_of_steps(run, task, policy), stream, callbacks)


def _ids(examples) -> list[str]:
    return [example.example_id for example in examples]


def test_without_options_it_is_the_shuffled_stream():
    collector, stream = _collector(EXAMPLES, _config(seed=3)), PromptStream(EXAMPLES, 3)
    for step in range(1, 8):
        assert [prompt.prompt_id for prompt in collector.prompts(4, step)] == _ids(stream.take_examples(4))
    [curriculum] = collector.callbacks
    assert curriculum.step_metrics(7) == {}


def test_short_ones_come_first_and_longer_ones_as_they_open():
    curriculum = _curriculum(EXAMPLES, _config(steps=5, shortest_share=0.2))
    assert set(_ids(curriculum.choose_prompts(2, 1))) == set(BY_LENGTH[:2])
    assert set(_ids(curriculum.choose_prompts(2, 2))) == set(BY_LENGTH[2:4])  # 0.4 is open: two are new
    assert set(_ids(curriculum.choose_prompts(2, 3))) == set(BY_LENGTH[4:6])
    assert curriculum.step_metrics(3) == {"curriculum/open": 0.6, "curriculum/seen": 0.6}
    assert set(_ids(curriculum.choose_prompts(4, 5))) == set(BY_LENGTH[6:])
    again = [_ids(curriculum.choose_prompts(5, step)) for step in (6, 7)]
    assert sorted(again[0] + again[1]) == sorted(BY_LENGTH)  # nobody a third time before everybody was there twice


def test_a_step_is_filled_even_where_too_few_are_open():
    curriculum = _curriculum(EXAMPLES, _config(steps=9, shortest_share=0.1))
    assert set(_ids(curriculum.choose_prompts(4, 1))) == set(BY_LENGTH[:4])
    with pytest.raises(ValueError, match="cannot take 11 different prompts from 10 examples"):
        curriculum.choose_prompts(11, 1)


def test_draws_within_a_step_differ_and_hold_no_example_twice():
    curriculum = _curriculum(EXAMPLES, _config(shortest_share=0.9))
    draws = [tuple(_ids(curriculum.choose_prompts(5, 1, draw))) for draw in range(6)]
    assert len(set(draws)) == 6
    assert all(len(set(draw)) == 5 for draw in draws)


def test_resamples_are_other_examples_than_the_step_has():
    """Ten are open. Steps of five with two resamples each: whatever was drawn before, none comes twice in a step while
    another one is left."""
    curriculum = _curriculum(EXAMPLES, _config(shortest_share=0.99))
    for step in range(1, 9):
        drawn = [_ids(curriculum.choose_prompts(count, step, draw)) for draw, count in enumerate((5, 2, 2))]
        assert len(set().union(*drawn)) == 9


@pytest.mark.parametrize("options", [{}, {"shortest_share": 0.3}])
def test_contract_9_the_state_goes_through_json_and_resumes(options):
    config = _config(seed=2, steps=6, **options)

    def steps(collector, first, last):
        taken = []
        for step in range(first, last + 1):
            taken.append([prompt.prompt_id for prompt in collector.prompts(4, step)])
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
    config = _config(shortest_share=0.5)
    state = _collector(EXAMPLES, config).state_dict()
    with pytest.raises(ValueError, match="the training data have changed since the checkpoint"):
        _collector(EXAMPLES[1:], config).load_state_dict(state)


def test_a_run_with_a_curriculum(micro_config, tmp_path):
    given = {"curriculum.steps": 3, "curriculum.shortest_share": 0.3, "sft.steps": 0}
    config = micro_config(tmp_path / "r", **given)
    with Task.of(config) as task:
        curriculum_examples = task.train
    train(config)
    lines = read_metrics(tmp_path / "r")
    assert [line["curriculum/open"] for line in lines] == pytest.approx([8 / 24, 16 / 24, 1])
    opened = sorted(len(example.solution) for example in curriculum_examples)[:8]
    drawn = {line["prompt_id"] for line in read_rollouts(tmp_path / "r", 1)}
    lengths = [len(e.solution) for e in curriculum_examples if e.example_id in drawn]
    assert len(lengths) == 4
    assert max(lengths) <= max(opened)

"""What Python reads of a mistake: the sentences of the command line, with arguments in place of flags."""

import pytest

from grpo.config.run import TrainConfig
from grpo.config.sampling import RolloutOptions
from rewards.config.options import ConfigError, load
from rewards.config.problems import command_line, in_python, python_words

MISTAKES = [
    {"num_generations": 4},
    {"stepz": 3},
    {"use_vllm": True},
    {"rollout": {"groupsize": 4}, "steps": "many"},
    {"loss": {"beta": 0.1, "kl_estimator": "none"}},
]


@pytest.mark.parametrize("options", MISTAKES, ids=lambda options: next(iter(options)))
def test_a_mistake_in_python_is_the_sentence_of_the_command(options):
    with pytest.raises(ConfigError) as in_a_program:
        TrainConfig(output_dir="r", **options)
    with pytest.raises(ConfigError) as in_a_command:
        load(TrainConfig, None, {"output_dir": "r", **options})
    assert [line.replace(" (command line)", "") for line in in_a_command.value.problems] == in_a_program.value.problems


def test_names_of_other_trainers_and_near_names_lead_to_ours():
    said = "num_generations=4: no such option; did you mean rollout.group_size?"
    with pytest.raises(ConfigError) as error:
        TrainConfig(output_dir="r", num_generations=4)
    assert str(error.value) == said
    with pytest.raises(ConfigError, match=r"^groupsize=4: no such option; did you mean group_size\?$"):
        RolloutOptions(groupsize=4)
    with pytest.raises(ConfigError, match=r'did you mean train\(config, resume="auto"\)\?$'):
        TrainConfig(output_dir="r", resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="zzzz=true: no such option; `quartet reference` prints all options"):
        TrainConfig(output_dir="r", zzzz=True)


def test_a_function_for_programs_names_arguments_and_a_command_flags():
    @python_words()
    def fails():
        raise ValueError("lower it and go on with --resume auto --force", 3)

    with pytest.raises(ValueError) as error:
        fails()
    assert error.value.args == ('lower it and go on with resume="auto", force=True', 3)
    with command_line(), pytest.raises(ValueError, match="go on with --resume auto --force"):
        fails()
    assert in_python("use --force to go on, or --stop_after") == "use force=True to go on, or stop_after"

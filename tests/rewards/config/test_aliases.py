"""Names that users know from TRL, verl and unsloth lead to the right option, or say why there is none."""

import argparse
import dataclasses
import re

import pytest

from grpo.cli.config.inference import EvalConfig, SampleConfig
from grpo.cli.parse import build_parser
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from rewards.config.names import hint, ours, trainers
from rewards.config.options import ConfigError, _options, load
from rewards.config.problems import unknown_option


def names(model) -> list[str]:
    return [option.key for option in _options(model.model_construct())]


def rows() -> list[dict]:
    return [row for table in trainers().values() for row in table.values()]


def said(key: str, model=TrainConfig, flags=("resume", "dry_run", "print_config")) -> str:
    """What `key` is answered, without the key itself."""
    return unknown_option(key, 1, "command line", [*names(model), *flags]).partition("): ")[2]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("learning_rate", "learner.learning_rate"),
        ("num_generations", "rollout.group_size"),
        ("max_completion_length", "rollout.max_completion_tokens"),
        ("per_device_train_batch_size", "prompts_per_step"),
        ("num_train_epochs", "steps"),
        ("max_steps", "steps"),
        ("model_name_or_path", "model"),
        ("report_to", "log.trackers"),
        ("save_steps", "checkpoint.every"),
        ("bf16", "dtype"),
        ("use_peft", "lora.rank"),
        ("warmup_steps", "learner.warmup_steps"),
        ("num-generations", "rollout.group_size"),
        ("beta", "loss.beta"),
        ("actor_rollout_ref.rollout.n", "rollout.group_size"),
        ("actor_rollout_ref.actor.optim.lr", "learner.learning_rate"),
        ("actor_rollout_ref.actor.kl_loss_coef", "loss.beta"),
        ("data.train_batch_size", "prompts_per_step"),
        ("data.max_response_length", "rollout.max_completion_tokens"),
        ("trainer.total_epochs", "steps"),
        ("algorithm.adv_estimator", "loss.advantage"),
        ("mtp.lr", "mtp.learning_rate"),
        ("use_vllm", "rollout.backend"),
        ("actor_rollout_ref.rollout.name", "rollout.backend"),
        ("vllm_server_base_url", "rollout.vllm.url"),
        ("vllm_gpu_memory_utilization", "rollout.vllm.engine"),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size", "rollout.vllm.engine"),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size", "learner.parallel.tensor"),
        ("actor_rollout_ref.actor.fsdp_config.fsdp_size", "learner.parallel.fsdp"),
        ("fsdp", "learner.parallel.fsdp"),
        ("trainer.nnodes", "learner.workers"),
        ("max_tool_calling_iterations", "max_turns"),
        ("environment_factory", "environment"),
        ("load_in_4bit", "lora.base"),
        ("bnb_4bit_quant_type", "lora.base"),
        ("optim", "learner.optimizer"),
        ("dataset_config", "data.name"),
        ("model_revision", "model"),
        ("chat_template_kwargs", "data.chat_template_kwargs"),
    ],
)
def test_a_name_of_another_trainer_leads_to_our_option(name, ours):
    assert said(name).startswith(f"no such option; did you mean {ours}?")


def test_a_name_without_counterpart_is_told_why():
    for name, why in {
        "top_p": "bias the gradient",
        "actor_rollout_ref.rollout.top_k": "bias the gradient",
        "vllm_structured_outputs_regex": "bias the gradient",
        "push_to_hub": "`quartet export RUN --push_to_hub OWNER/NAME` uploads the policy",
        "hub_model_id": "`quartet export RUN --push_to_hub OWNER/NAME` uploads the policy",
        "load_in_8bit": "lora.base: nf4 is the only base in fewer bits",
        "bnb_4bit_use_double_quant": "are not quantised again",
        "data.max_prompt_length": "a prompt is never cut",
    }.items():
        assert said(name).startswith("not supported, because ")
        assert why in said(name)
        assert "did you mean" not in said(name)


def test_each_command_is_led_to_its_own_option_and_to_none_that_it_lacks():
    for model, name, option in (
        (SftConfig, "learning_rate", "learner.learning_rate"),
        (SftConfig, "max_steps", "steps"),
        (SftConfig, "per_device_train_batch_size", "prompts_per_step"),
        (MtpConfig, "learning_rate", "mtp.learning_rate"),
        (MtpConfig, "num_generations", "rollout.group_size"),
        (EvalConfig, "max_new_tokens", "rollout.max_completion_tokens"),
        (EvalConfig, "num_generations", "eval.samples"),
        (EvalConfig, "dataset_name", "data.name"),
        (SampleConfig, "num_generations", "samples"),
    ):
        assert said(name, model).startswith(f"no such option; did you mean {option}?"), (model, name)
    assert hint("learning_rate", names(EvalConfig)) is None
    assert said("learning_rate", EvalConfig) == "no such option; see --help all for all options"


def test_a_word_with_several_meanings_shows_them_all_and_one_that_is_like_nothing_none():
    assert said("workers") == "no such option; did you mean rollout.workers or learner.workers?"
    for name in ("use_something", "foo", "eval_limits_of_time", "mtp.colour", "zero_stage"):
        assert said(name) == "no such option; see --help all for all options"


def test_every_option_of_trls_grpo_config_is_answered():
    """With an option that there is, or with a reason; never with a guess."""
    from trl import GRPOConfig  # which is slow to import

    known = names(TrainConfig)
    for field in dataclasses.fields(GRPOConfig):
        if field.name in known:
            continue
        answer = said(field.name)
        ours = answer.partition("did you mean ")[2].partition("?")[0]
        is_known = ours in known or ours == "--resume"
        assert is_known or answer.startswith("not supported, because "), (field.name, answer)
        if ours.rpartition(".")[2] != field.name:  # a guess by similarity would be wrong here
            assert hint(field.name, known), (field.name, answer)


COMMANDS = (TrainConfig, SftConfig, MtpConfig, EvalConfig, SampleConfig)


def test_every_alias_leads_to_an_option_of_train_and_none_hides_one():
    known = names(TrainConfig)
    of_any = {*known, *(key for model in COMMANDS for key in names(model)), "--resume"}
    for row in (row for row in rows() if ours(row)):
        first, *others = ours(row)
        assert first in known or first == "--resume", row
        assert {*others} <= of_any, row
        assert "why" not in row
        assert row["short"] not in known or row["short"] == first


def test_every_option_and_command_that_a_note_or_a_reason_names_exists():
    """`section.option`, and `quartet COMMAND --flag`, wherever they are; a value may follow the option."""
    known = names(TrainConfig)
    sections = {key.partition(".")[0] for key in known if "." in key}
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    named, run = set(), set()
    for said in (text for row in rows() for text in (*ours(row), row.get("note", ""), row.get("why", ""))):
        words = re.findall(r"(?<![\w/.])[a-z_]+(?:\.[a-z_]+)+\b", said)
        named |= {word for word in words if word.partition(".")[0] in sections}
        run |= set(re.findall(r"quartet ([a-z]+) [^`]*(--\w+)", said))
    assert named <= set(known)
    assert len(named) > 20
    assert run
    for command, flag in run:
        assert flag in commands[command].format_help(), (command, flag)


def test_a_section_of_verls_is_answered_line_by_line(tmp_path):
    file = tmp_path / "verl.yaml"
    file.write_text(
        "output_dir: x\nactor_rollout_ref:\n  rollout:\n    n: 5\n    top_p: 0.9\n  model: {path: a/b}\n"
        "something: {a: 1}\n"
    )
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, file, {})
    assert error.value.problems == [
        f"actor_rollout_ref.rollout.n=5 ({file}, line 4): no such option; did you mean rollout.group_size?",
        f"actor_rollout_ref.rollout.top_p=0.9 ({file}, line 5): not supported, because it cuts the distribution, so "
        "the sampled tokens are no longer the policy's and bias the gradient",
        f"actor_rollout_ref.model.path=a/b ({file}, line 6): no such option; did you mean model?",
        f"something ({file}, line 7): no such option; see --help all for all options",
    ]

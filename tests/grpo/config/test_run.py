import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig

from grpo.algorithm.losses import Logprobs, WholeStep, policy_loss
from grpo.cli.config.inference import EvalConfig, SampleConfig, defaults_of_run
from grpo.cli.config.serve import ServeConfig
from grpo.config.loss import LossOptions
from grpo.config.run import SftConfig, TrainConfig
from grpo.config.sampling import RolloutOptions
from rewards.commands.options import RewardTestConfig
from rewards.config import names
from rewards.config.data import SourceOptions
from rewards.config.names import recorded_options
from rewards.config.options import ConfigError, _options, dump_yaml, load
from rewards.config.reward import ScoringOptions
from rewards.config.yaml_file import to_yaml
from rewards.group_score import FailurePolicy

# Ours <- TRL's, where the names differ.
TRL_NAMES = {
    "importance_correction": None,  # `vllm_importance_sampling_correction` and `.._mode`; ours is off, contract 8
    "kl_estimator": None,
    "advantage": None,
}


def test_every_option_says_what_it_does():
    for config in (TrainConfig, SftConfig, EvalConfig, SampleConfig):
        for option in _options(config.model_construct()):
            if not option.is_group and option.model is None:
                assert re.fullmatch(r".{9,}[.]", option.help), option.key


def test_loss_options_have_the_defaults_of_trl():
    theirs = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    for name, field in LossOptions.model_fields.items():
        other = TRL_NAMES.get(name, name)
        if other is not None:
            assert other in theirs, f"TRL has no {other}"
            assert field.default == theirs[other], name


def test_loss_options_are_those_of_the_loss():
    """Without options the loss is that of the defaults."""
    policy, old = torch.tensor([[0.9, 0.5], [0.2, 0.7]]).log(), torch.tensor([[0.4, 0.5], [0.4, 0.5]]).log()
    given = Logprobs(policy, old), torch.tensor([1.0, -1.0]), torch.tensor([[True, True], [True, False]])
    (one, first), (two, second) = policy_loss(*given), policy_loss(*given, LossOptions())
    assert (one, first) == (two, second)


def test_what_a_failure_means_is_refused_where_the_scorer_would():
    usable = ["abort", "drop_sample", "drop_group", "score=0", "score=-1.5", "score=1e-3"]
    for words in (*usable, "score", "zero", "score=x", "score=inf"):
        if words in usable:
            FailurePolicy.parse(words)
            assert ScoringOptions(on_error=words).on_error == words
        else:
            with pytest.raises(RuntimeError):
                FailurePolicy.parse(words)
            with pytest.raises(ConfigError):
                ScoringOptions(on_error=words)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rollout.group_size": 1}, "rollout.group_size=1"),
        ({"loss.beta": 0.1, "loss.kl_estimator": "none"}, "beta=0.1 weighs a KL penalty, but kl_estimator=none comput"),
        ({"rollout.temperature": 0}, "rollout.temperature=0"),
        ({"rollout.top_p": 0.9}, "rollout.top_p=0.9"),  # contract 2: there is none in training
        ({"loss.epsilon": -0.1}, "loss.epsilon=-0.1"),
        ({"loss.loss_type": "sapo", "loss.epsilon": 0.1}, "epsilon=0.1: loss_type sapo does not read it"),
        ({"loss.loss_type": "cispo", "loss.epsilon_high": 5.0, "loss.delta": 2.0}, "use epsilon_high, the cap"),
        ({"loss.advantage": "rank_softmax", "loss.epsilon_high": 0.28}, "loss_type reinforce does not read it"),
        ({"learner.learning_rate": 0}, "learner.learning_rate=0"),
        ({"learner.learning_rate": float("nan")}, "learner.learning_rate"),
        ({"mtp.depth": 0}, "mtp.depth=0"),
        ({"rewards": []}, "rewards"),
        ({"device": 3}, "device=3"),
        ({"steps": 0}, "steps=0"),
        ({"learner.betas": [0.9, 1.0]}, "learner.betas=[0.9, 1.0]"),  # AdamW refused these once all was loaded
        ({"learner.betas": [-0.1, 0.9]}, "learner.betas"),
        ({"seed": 2**64}, "seed=18446744073709551616"),  # and torch these
        ({"seed": -(2**63) - 1}, "seed="),
        # A dry run passed the first of these, hung or had a traceback.
        ({"threads": 10**12}, "threads=1000000000000 (command line): expected less than or equal to 1024"),
        ({"rollout.group_size": 10**12}, "no batch holds such a group; use at most 65,536"),
        ({"eval.samples": 10**12}, "eval.samples=1000000000000 (command line): expected less than or equal to 65536"),
        ({"lora.rank": 10**12}, "lora.rank=1000000000000 (command line): expected less than or equal to 4096"),
        ({"rollout.draft_tokens": 10**12}, "rollout.draft_tokens=1000000000000 (command line): expected less than or"),
        ({"rollout.max_resamples": 65_537}, "rollout.max_resamples=65537 (command line): expected less than or equal"),
        ({"learner.updates_per_batch": 1025}, "learner.updates_per_batch=1025 (command line): expected less than or"),
    ],
)
def test_impossible_values_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as refusal:
        load(TrainConfig, None, {"output_dir": "r"} | overrides)
    assert any(message in problem for problem in refusal.value.problems)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "reinforce"])
def test_an_option_is_refused_exactly_where_it_changes_no_loss(loss_type):
    torch.manual_seed(0)
    others = {"epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.01}
    logprobs, old, mask = torch.randn(4, 5), torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    usual = {"epsilon_high": 1.5} if loss_type == "cispo" else {}

    def loss(options):
        advantages, step = torch.tensor([1.0, -1.0, 2.0, -2.0]), WholeStep(max_completion_length=5)
        return policy_loss(Logprobs(logprobs, old), advantages, mask, options, step=step)[0]

    for name, value in others.items():
        given = {"loss_type": loss_type} | usual | {name: value}
        unread = loss(LossOptions.model_construct(**given)) == loss(
            LossOptions.model_construct(loss_type=loss_type, **usual)
        )
        with pytest.raises(ValueError, match=f"{name}={value}") if unread else nullcontext():
            LossOptions(**given)


def test_supervised_defaults_are_a_run_and_those_of_grpo_skip_it():
    assert load(SftConfig, None, {"output_dir": "r"}).supervision.steps == 200
    assert load(TrainConfig, None, {"output_dir": "r"}).supervision.steps == 0
    # A partial option keeps the rest of its group's default.
    assert load(SftConfig, None, {"output_dir": "r", "learner.weight_decay": 0.1}).learner.schedule == "linear"


def test_a_run_folder_may_be_in_the_home_folder(tmp_path, monkeypatch):
    """A folder `~` was made in its place: who removes that by its name removes the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(TrainConfig, None, {"output_dir": "~/runs/mine"})
    assert config.output_dir == tmp_path / "runs/mine"
    for name in ("~nobody_has_this_name/x", "runs/~"):
        assert load(TrainConfig, None, {"output_dir": name}).output_dir == Path(name)


def test_a_run_hands_over_every_option_of_its_evaluation(tmp_path):
    given = {
        "output_dir": str(tmp_path),
        "seed": 5,
        "data.prompt_column": "problem",
        "data.solution_column": "solution",
        "data.template": {"system": "Be brief."},
        "data.few_shot": 2,
        "eval.split": "validation",
        "data.task_options.levels": [2, 3],
        "eval.limit": 17,
        "rollout.temperature": 0.5,
        "rollout.max_completion_tokens": 99,
        "rollout.draft_tokens": 3,
        "rewards": [{"function": "math_equivalence", "weight": 2.0}],
        "reward.on_error": "score=0",
    }
    run = load(TrainConfig, None, given)
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    config = load(EvalConfig, None, defaults_of_run(tmp_path))
    same = ("name", "prompt_column", "solution_column", "template", "few_shot", "task_options")
    assert {name: getattr(config.data, name) for name in same} == {name: getattr(run.data[0], name) for name in same}
    assert (config.data.few_shot, config.data.task_options) == (2, {"levels": [2, 3]})
    assert (config.eval.split, config.eval.limit) == ("validation", 17)
    rollout = config.rollout
    assert (rollout.temperature, rollout.max_completion_tokens, rollout.draft_tokens) == (0.5, 99, 3)
    assert config.seed == 5
    assert (config.rewards, config.reward) == (run.rewards, run.reward)


def test_a_run_without_evaluation_is_evaluated_on_everything(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(load(TrainConfig, None, {"output_dir": str(tmp_path)})))
    config = load(EvalConfig, None, defaults_of_run(tmp_path))
    assert config.eval.limit is None
    assert config.data.task_options == {}


def test_eval_has_the_defaults_of_training():
    """`quartet eval MODEL` after `quartet train --model MODEL` asks the same questions in the same way."""
    ours, data, rollout = EvalConfig(), SourceOptions(), RolloutOptions()
    for name in ("prompt_column", "solution_column", "template", "few_shot", "task_options"):
        assert getattr(ours.data, name) == getattr(data, name)
    for name in ("temperature", "max_completion_tokens", "draft_tokens"):
        assert getattr(ours.rollout, name) == getattr(rollout, name)
    assert ours.data.name == data.name


def test_what_a_run_of_version_0_2_has_recorded_of_its_data_is_read(tmp_path):
    of_02 = {"held_out_seed": 0, "sources": [], "system_prompt": "Be brief.", "user_turn": "Q: {question}"}
    (tmp_path / "config.yaml").write_text(
        to_yaml({"output_dir": "r", "data": {"name": "word_problems", "template": "chat", "levels": [1]} | of_02})
    )
    messages = {"system": "Be brief.", "user": "Q: {question}"}
    told: list[str] = []
    [source] = load(TrainConfig, tmp_path / "config.yaml", {}, on_removed=told.append).data
    assert (source.template, source.task_options, told) == (messages, {"levels": [1]}, [])
    _, options = recorded_options(tmp_path / "config.yaml")
    assert EvalConfig(data=options["data"]).data.template == messages
    with pytest.raises(ConfigError, match=r"data.held_out_seed=3 .command line.: it is gone, since the content"):
        load(TrainConfig, None, {"output_dir": "r", "data.held_out_seed": 3})
    with pytest.raises(ConfigError, match=r"data.system_prompt=Hi .command line.: it is gone, since the messages"):
        load(TrainConfig, None, {"output_dir": "r", "data.system_prompt": "Hi"})
    # Levels are those of word_problems; other data never read them.
    other = load(TrainConfig, None, {"output_dir": "r", "data": {"name": "gsm8k", "levels": [3]}})
    assert other.data[0].task_options == {}


def test_reward_models_of_version_0_2_are_rewards(tmp_path):
    """By `quartet eval RUN` and `export RUN`; a file of today that has them is refused with the way out."""
    models = [{"name": "judge", "model": "m", "kind": "chat_classifier"}, {"name": "other", "model": "m"}]
    reader = {"function": "column", "weight": 2.0, "arguments": {"name": "judge"}, "chat": False}
    (tmp_path / "config.yaml").write_text(to_yaml({"output_dir": "r", "rewards": [reader], "reward_models": models}))
    _, options = recorded_options(tmp_path / "config.yaml")
    judge = {"function": "model:m", "weight": 2.0, "arguments": {"kind": "chat_classifier"}, "name": "judge"}
    other = {"function": "model:m", "weight": 0.0, "arguments": {}, "name": "other"}
    assert options["rewards"] == [judge, other]
    with pytest.raises(ConfigError, match="reward_models.* it is gone, since a reward model is a reward"):
        load(EvalConfig, None, {"reward_models": models})


RENAMED_AFTER_0_2 = {  # by the option of today: the command, its name in 0.2, and a value that is not the default
    "sft.steps": (TrainConfig, "warm_start.steps", 5),
    "sft.schedule": (TrainConfig, "warm_start.schedule", "constant"),
    "rollout.staleness": (TrainConfig, "rollout.ahead", 2),
    "rollout.max_resamples": (TrainConfig, "rollout.refill_draws", 3),
    "rollout.lossy_margin": (SampleConfig, "rollout.margin", 1.5),
    "mtp.train_base_model": (SftConfig, "mtp.train_trunk", True),
    "max_score": (RewardTestConfig, "full_marks", 2.0),
}


@pytest.mark.parametrize("key", RENAMED_AFTER_0_2)
def test_a_name_of_0_2_is_read_everywhere_with_a_notice_and_refused_beside_the_new_one(key, tmp_path, caplog):
    command, old, value = RENAMED_AFTER_0_2[key]
    required = {"output_dir": "r"} if command in (TrainConfig, SftConfig) else {}
    section, _, last = old.rpartition(".")
    nested = {section: {last: value}} if section else {old: value}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(required | nested))
    expected = load(command, None, required | {key: value})
    assert load(command, None, required | {old: value}) == expected
    assert load(command, file, {}) == expected
    assert [text.partition(";")[0] for text in caplog.messages] == [
        f"{old} is {key} now",
        "warm_start is sft now" if section == "warm_start" else f"{old} is {key} now",
    ]
    caplog.clear()
    assert load(command, file, {}, on_removed=lambda text: None) == expected  # of a run that is resumed
    assert not caplog.messages
    assert command(**required, **nested) == expected
    with pytest.raises(ConfigError, match=rf"{old}=.* .command line.: no such option; did you mean {key}\?"):
        load(command, None, required | {key: value, old: value})
    if section:
        new_section, _, new_last = key.rpartition(".")
        both = {section: {last: value}}
        both[new_section] = both.get(new_section, {}) | {new_last: value}
        file.write_text(to_yaml(required | both))
        with pytest.raises(ConfigError, match=rf"{last}=.*, line \d+.: no such option; did you mean {key}"):
            load(command, file, {})


LEFT_AFTER_0_2 = {  # its default, and a value that somebody may have set
    "cassette.file": (None, "answers.jsonl"),
    "cassette.faults": ({}, {"late": 0.1}),
    "curriculum.by_difficulty": (False, True),
    "curriculum.candidates": (1, 4),
    "mtp.every": (1, 4),
    "mtp.share": (1.0, 0.5),
    "mtp.tv": (False, True),
    "log.measure_speed": (False, True),
    "learner.parallel.fsdp_cpu_offload": (False, True),
    "data.thoughts": ("keep", "fork"),
}


@pytest.mark.parametrize("key", LEFT_AFTER_0_2)
def test_a_run_of_0_2_goes_on_without_what_left_and_says_what_it_had_set(key):
    default, given = LEFT_AFTER_0_2[key]
    words: list[str] = []
    plain = load(TrainConfig, None, {"output_dir": "r"})
    assert load(TrainConfig, None, {"output_dir": "r", key: default}, on_removed=words.append) == plain
    assert words == []
    assert load(TrainConfig, None, {"output_dir": "r", key: given}, on_removed=words.append) == plain
    [word] = words
    assert word.startswith(key)
    assert ": it is gone, since " in word
    with pytest.raises(ConfigError, match=f"{key}.* it is gone, since "):
        load(TrainConfig, None, {"output_dir": "r", key: given})
    with pytest.raises(ConfigError, match=r"backend=vllm .command line.: it is gone, since .* run quartet export"):
        load(ServeConfig, None, {"model": "runs/demo", "backend": "vllm"})


def test_what_a_command_does_not_use_is_refused_unless_it_is_its_default(monkeypatch):
    """A file for several commands may say what is usual; a run that goes on has recorded more than is used today."""
    monkeypatch.setattr(names, "_removed", lambda: {"curriculum.draft_depth": ("it gained nothing", None)})
    usual = {"output_dir": "r", "rollout.workers": 0, "loss": {"beta": 0.0}, "curriculum.draft_depth": None}
    assert load(SftConfig, None, usual) == load(SftConfig, None, {"output_dir": "r"})
    with pytest.raises(
        ConfigError, match=r"^rollout.workers=2 .command line.: quartet sft does not use it; leave it out$"
    ):
        load(SftConfig, None, usual | {"rollout.workers": 2})
    words: list[str] = []
    recorded = usual | {"rollout.workers": 2, "curriculum.draft_depth": 1}
    assert load(SftConfig, None, recorded, on_removed=words.append).output_dir == Path("r")
    assert [word.partition(":")[0] for word in words] == ["curriculum.draft_depth=1"]

"""What a command of verl's is here. The commands have the form of examples/grpo_trainer/*.sh of verl."""

import re
from contextlib import suppress

import pytest
from datasets import Dataset

from grpo.cli.migration.verl_command import ACTOR, read_overrides, read_verl_command
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from review.readers.run_folder import read_metrics
from rewards.config.names import trainers
from rewards.data.examples import load_examples
from rewards.registry import load_reward

PPO = "python3 -m verl.trainer.main_ppo"
SCRIPT = """
set -x
export LR=2e-6
DATA=(
    data.train_files={folder}/train.parquet
    data.val_files={folder}/test.parquet
    data.train_batch_size=8
)
# python3 -m verl.trainer.main_ppo nothing.of=this
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    "${{DATA[@]}}" \\
    data.max_prompt_length=512 \\
    data.max_response_length=128 \\
    actor_rollout_ref.model.path=models/small \\
    actor_rollout_ref.actor.optim.lr=$LR \\
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=${{KL:-0.002}} \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.rollout.name=vllm \\
    actor_rollout_ref.rollout.n=5 \\
    actor_rollout_ref.rollout.top_p=0.9 \\
    algorithm.use_kl_in_reward=False \\
    trainer.critic_warmup=0 \\
    trainer.logger='["console","wandb"]' \\
    trainer.project_name=p trainer.experiment_name=e \\
    trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=3 $@
"""


def row(number: int) -> dict:
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{number} + 3 = ?"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 3)},
        "extra_info": {"index": number},
    }


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", str(tmp_path / "none"))
    Dataset.from_list([row(number) for number in range(2, 22)]).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list([row(number) for number in range(50, 54)]).to_parquet(tmp_path / "test.parquet")
    return tmp_path


def test_a_shell_file_becomes_a_configuration(files):
    script = files / "run.sh"
    script.write_text(SCRIPT.format(folder=files))
    migration = read_verl_command(script)
    config = TrainConfig(**migration.tree)
    assert (config.prompts_per_step, config.rollout.group_size) == (4, 5)
    assert config.steps == 3 * 2 * 2  # epochs, batches of 8 among 20 rows, updates of 4
    assert (config.checkpoint.every, config.eval.every, config.eval.limit) == (40, 10, 4)
    assert config.learner.learning_rate == 2e-6
    assert config.learner.weight_decay == 0.01
    assert config.learner.betas == (0.9, 0.999)
    assert (config.loss.beta, config.loss.kl_estimator) == (0.002, "k3")
    assert (config.loss.loss_type, config.loss.delta, config.loss.importance_correction) == ("dapo", 3.0, "none")
    assert config.rollout.max_completion_tokens == 128
    assert config.log.trackers == ["wandb"]
    assert str(config.output_dir) == "checkpoints/p/e"
    assert [reward.function for reward in config.rewards] == ["gsm8k"]
    assert config.data[0].template == "chat"
    [example, *_] = load_examples(config.data[0].name, "train", config.data[0])
    assert (example.solution, example.question) == ("5", "2 + 3 = ?")
    lost = {each.option: each.changes_training for each in migration.unsupported}
    assert lost == {
        "actor_rollout_ref.actor.ppo_mini_batch_size": True,
        "actor_rollout_ref.rollout.name": False,
        "data.max_prompt_length": True,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": False,
        "actor_rollout_ref.rollout.top_p": True,
    }


def test_a_reward_of_verls_form_is_called_for_each_completion(files):
    (files / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, unit=1):\n"
        "    right = solution_str == ground_truth * unit\n"
        "    return {'score': 1.0, 'index': extra_info['index']} if right else 0.0\n"
    )
    command = f"{PPO} data.train_files={files}/train.parquet custom_reward_function.path={files}/mine.py"
    command += " +custom_reward_function.reward_kwargs.unit=1"
    [reward] = read_verl_command(command).rewards
    assert reward["arguments"] == {"unit": 1}
    columns = {"data_source": ["a", "a"], "ground_truth": ["5", "6"], "extra_info": [{"index": 0}, {"index": 1}]}
    assert load_reward(reward["function"])(prompts=["", ""], completions=["5", "5"], **columns) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("words", "option", "reason"),
    [
        ("actor_rollout_ref.actor.clip_ratio=0.1", "actor_rollout_ref.actor.clip_ratio", "clip_ratio_low"),
        ("algorithm.adv_estimator=remax", "algorithm.adv_estimator", "loss.advantage is one of"),
        ("algorithm.use_kl_in_reward=True", "algorithm.use_kl_in_reward", "never of the reward"),
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n", "two completions or more"),
    ],
)
def test_what_has_no_counterpart_is_said(files, words, option, reason):
    more = "" if words.startswith("actor_rollout_ref.rollout.n=") else "actor_rollout_ref.rollout.n=2"
    command = f"{PPO} data.train_files={files}/train.parquet data.train_batch_size=4 {words} {more}"
    [each] = read_verl_command(command).unsupported
    assert each.option == option
    assert reason in each.reason


@pytest.mark.parametrize(
    ("mode", "loss", "lost"),
    [
        (
            "gspo",
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.3, "delta": None},
            None,
        ),
        ("sapo", {"loss_type": "sapo", "importance_sampling_level": "token", "delta": None}, None),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 1.3, "delta": None}, f"{ACTOR}.clip_ratio_low"),
        ("cispo clip_ratio_low=10", {"loss_type": "cispo", "epsilon_high": 1.3}, None),
        ("sapo tau_neg=2.0", {"loss_type": "sapo"}, f"{ACTOR}.tau_neg"),
        ("gpg", {"loss_type": "dapo", "epsilon_high": 0.3, "delta": 3.0}, f"{ACTOR}.policy_loss.loss_mode"),
    ],
)
def test_a_loss_of_verls_is_ours_with_what_it_reads(files, mode, loss, lost):
    """verl's gspo and sapo take the mean of each completion first, and have no dual clip (core_algos.py)."""
    mode, *more = mode.split()
    command = f"{PPO} data.train_files={files}/train.parquet data.train_batch_size=4 actor_rollout_ref.rollout.n=2"
    command += f" {ACTOR}.policy_loss.loss_mode={mode} {ACTOR}.clip_ratio_high=0.3 {ACTOR}.loss_agg_mode=token-mean"
    migration = read_verl_command(" ".join([command, *(f"{ACTOR}.{word}" for word in more)]))
    options = TrainConfig(**migration.tree).loss
    assert {name: getattr(options, name) for name in loss} == loss
    assert [each.option for each in migration.unsupported] == [lost] * (lost is not None)
    assert all("importance_sampling_level is one of" not in each.reason for each in migration.unsupported)


def test_a_scale_that_an_estimator_does_not_read_is_left_out(files):
    words = "algorithm.norm_adv_by_std_in_grpo=False actor_rollout_ref.rollout.n=2 data.train_batch_size=4"
    command = f"{PPO} data.train_files={files}/train.parquet {words} algorithm.adv_estimator="
    assert read_verl_command(command + "grpo").tree["loss"]["scale_rewards"] == "none"
    assert "scale_rewards" not in read_verl_command(command + "rloo").tree["loss"]


@pytest.mark.parametrize("value", ["0", "abc", "null", "[]", "1.5", "-2"])
@pytest.mark.parametrize(
    "name",
    [
        "data.train_batch_size",
        f"{ACTOR}.ppo_mini_batch_size",
        "actor_rollout_ref.rollout.n",
        "trainer.total_epochs",
        "actor_rollout_ref.rollout.val_kwargs.n",
    ],
)
def test_a_count_that_is_none_is_an_error_with_its_name(name, value):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}={re.escape(value)}: .*whole number of at least 1"):
        read_verl_command(f"{PPO} {name}={value}")


@pytest.mark.parametrize("value", ["0", "abc", "null", "[]", "1e400"])
def test_no_value_of_any_option_is_a_fault_of_ours(value):
    rows = trainers()["verl"]
    for name in (name for name, row in rows.items() if {"default", "same", "now"} & row.keys()):
        with suppress(ValueError):
            read_verl_command(f"{PPO} {name}={value}").yaml()


def test_a_wrong_value_ends_the_command_without_a_traceback(tmp_path, capsys):
    assert main(["from-verl", f"{PPO} data.train_batch_size=0", "--out", str(tmp_path / "run.yaml")]) == 1
    assert "data.train_batch_size=0" in capsys.readouterr().err


def test_a_setting_that_is_no_secret_is_read(monkeypatch):
    monkeypatch.setenv("MAX_TOKEN_LEN", "8")
    monkeypatch.setenv("MAX_TOKENS", "9")
    assert read_overrides(f"{PPO} a=${{MAX_TOKEN_LEN:-1}} b=${{MAX_TOKENS:-1}}").values == {"a": 8, "b": 9}


def test_defaults_of_verls_are_written_where_ours_are_others(files):
    command = f"{PPO} data.train_files={files}/train.parquet actor_rollout_ref.rollout.n=4"
    config = TrainConfig(**read_verl_command(command).tree)
    assert config.loss.advantage == "gae"
    assert config.learner.schedule == "constant"
    assert config.rollout.max_completion_tokens == 512
    assert config.prompts_per_step == 256
    short = read_verl_command(f"{command} data.train_batch_size=512 trainer.total_training_steps=7")
    assert short.options["steps"] == 14  # as many updates


def test_files_that_are_elsewhere_are_said(tmp_path):
    migration = read_verl_command(f"{PPO} data.train_files=/there/a.parquet")
    assert "trainer.total_epochs" in {each.option for each in migration.unsupported}
    assert migration.options["data"]["name"] == "/there/a.parquet"


def test_what_a_shell_file_computes_is_read():
    """Forms that the files in verl's own examples/ have."""
    text = """
    n_prompts=${N_PROMPTS_OF_NOBODY:-${OTHER_OF_NOBODY:-16}}
    length=$((1024 * 2))
    ACTOR=(
        actor.lr=1e-6   # the rate
        actor.length=$((length + 24))
    )
    ONE=(one.a=1 one.b=x)
    python3 -m verl.trainer.main_ppo "${ACTOR[@]}" ${ONE[@]} n=$n_prompts twice=$((n_prompts * 2)) \\
        rank=${RANK_OF_NOBODY} '+names={a.\\\\{*\\\\}:{}}' "$@"
    """
    found = read_overrides(text)
    assert found.unknown == {"rank": ("${RANK_OF_NOBODY}", ["RANK_OF_NOBODY"])}
    assert found.values.pop("names").startswith("{a.")
    expected = {"actor.lr": 1e-6, "actor.length": 2072, "one.a": 1, "one.b": "x", "n": 16, "twice": 32}
    assert found.values == expected
    migration = read_verl_command(f"{PPO} data.train_batch_size=$NOBODYS")
    [each] = [each for each in migration.unsupported if each.option == "data.train_batch_size"]
    assert "not in the text" in each.reason


def test_variables_are_those_that_bash_would_have(monkeypatch):
    monkeypatch.setenv("LR", "5")
    assert read_overrides(f"A_OF_NOBODY=${{A_OF_NOBODY:-3}}\n{PPO} a=$A_OF_NOBODY").values == {"a": 3}
    assert read_overrides(f"A_OF_NOBODY=\nB=${{A_OF_NOBODY:-${{LR:-4}}}}\n{PPO} b=$B").values == {"b": 5}
    assert read_overrides(f"LR=1\nLR=2\n{PPO} a=$LR\nLR=3").values == {"a": 2}
    assert read_overrides(f"export LR=3 && {PPO} a=$LR").values == {"a": 3}
    assert read_overrides(f"LR=3 {PPO} a=$LR 2>&1 | tee --x=y").values == {"a": 5}
    assert read_overrides(f"LR=\n{PPO} a=1$LR").values == {"a": 1}
    assert read_overrides(f"RATE=$LR\nLR=2\n{PPO} a=$RATE b=$LR").values == {"a": 5, "b": 2}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--config-path=c --config-name='x.yaml'", {"--config-name", "--config-path"}),
        ("-cn x", {"--config-name"}),
        ("--config-path c --config-name ppo_trainer.yaml", set()),
    ],
)
def test_another_file_of_defaults_is_said(files, words, names):
    migration = read_verl_command(f"{PPO} data.train_files={files}/train.parquet {words}")
    assert {each.option for each in migration.unsupported if each.option.startswith("-")} == names
    assert all("ppo_trainer.yaml" in each.reason for each in migration.unsupported if each.option in names)


def test_steps_are_counted_over_the_rows_that_are_taken(files):
    command = f"{PPO} data.train_files={files}/train.parquet data.train_batch_size=4 trainer.total_epochs=3"
    assert read_verl_command(f"{command} data.train_max_samples=8").options["steps"] == 6
    assert read_verl_command(f"{command} data.train_max_samples=99").options["steps"] == 15


OPTIM = "actor_rollout_ref.actor.optim"


@pytest.mark.parametrize(
    ("words", "key", "ours"),
    [
        ("model_engine=veomni", "learner.schedule", "cosine"),  # its own default
        ("model_engine=torchtitan", "learner.schedule", "linear"),
        (f"model_engine=megatron {OPTIM}.lr_decay_style=cosine", "learner.schedule", "cosine"),
        (f"model_engine=veomni {OPTIM}.lr_scheduler_type=constant", "learner.schedule", "constant"),
        (f"--config-name=ppo_megatron_trainer.yaml {OPTIM}.warmup_style=null", "learner.schedule", "constant"),
        (f"{OPTIM}.lr_warmup_steps=null {OPTIM}.lr_warmup_steps_ratio=0.5", "learner.warmup_steps", 5),
        (f"'{OPTIM}={{lr:3e-6,weight_decay:0}}'", "learner.learning_rate", 3e-6),
        ("'+data.apply_chat_template_kwargs={a:1}' +data.apply_chat_template_kwargs.b=False", "data.kwargs", {}),
        ("data.max_response_length='${data.max_prompt_length}' data.max_prompt_length=7", "rollout.tokens", 7),
        ("++actor_rollout_ref.rollout.temperature=0.7", "rollout.temperature", 0.7),
        ("trainer.test_freq=False trainer.save_freq=false", "checkpoint.every", 10),
    ],
)
def test_a_value_is_carried_over_in_each_form_that_hydra_has(files, words, key, ours):
    command = f"{PPO} data.train_files={files}/train.parquet data.train_batch_size=4 actor_rollout_ref.rollout.n=2"
    migration = read_verl_command(f"{command} trainer.total_training_steps=10 {words}")
    config = TrainConfig(**migration.tree)
    assert {each.option for each in migration.unsupported} <= {"data.max_prompt_length"}
    if key == "data.kwargs":
        assert config.data[0].chat_template_kwargs == {"a": 1, "b": False}
        return
    options = config.model_dump()
    for name in key.replace("tokens", "max_completion_tokens").split("."):
        options = options[name]
    assert options == ours


@pytest.mark.parametrize(
    ("words", "option", "reason", "changes"),
    [
        (f"{ACTOR}.kl_loss_coef=1 ~{ACTOR}.kl_loss_coef", f"~{ACTOR}.kl_loss_coef", "deleted there", True),
        ("~trainer.nnodes", "~trainer.nnodes", "deleted there", False),
        ("$(cat words.txt)", "$(cat words.txt)", "cat words.txt", True),
        ("data.seed='${oc.env:SEED_OF_NOBODY}'", "data.seed", "SEED_OF_NOBODY=VALUE", True),
        ("trainer.nnodes='${nobody.knows}'", "trainer.nnodes", "nobody.knows", False),
        ("critic.optim.lr=1", "critic.optim.lr", "without algorithm.adv_estimator=gae", False),
        ("algorithm.kl_ctrl.kl_coef=1", "algorithm.kl_ctrl.kl_coef", "without algorithm.use_kl_in_reward=True", False),
        ("reward_model.model.path=x", "reward_model.model.path", "without reward_model.enable=True", False),
        ("trainer.val_before_train=False", "trainer.val_before_train", "before its first step", False),
        ("actor_rollout_ref.rollout.val_kwargs.top_p=0.9", "actor_rollout_ref.rollout.val_kwargs.top_p", "both", False),
        ("model_engine=mine", "model_engine", "", False),
        ("--config-path=/nowhere --config-name=x", "--config-name", "ppo_trainer.yaml", True),
    ],
)
def test_what_verl_would_not_read_or_nobody_knows_is_said_with_the_reason(files, words, option, reason, changes):
    command = f"{PPO} data.train_files={files}/train.parquet data.train_batch_size=4 algorithm.adv_estimator=grpo"
    migration = read_verl_command(f"{command} actor_rollout_ref.rollout.n=2 {words}")
    lost = {each.option: each for each in migration.unsupported}
    assert lost.keys() - {"--config-path"} == {option}
    assert reason in lost[option].reason
    assert lost[option].changes_training is changes
    TrainConfig(**migration.tree)


def test_a_file_of_defaults_that_is_here_is_read_below_the_command(files):
    (files / "own.yaml").write_text(
        "hydra: {searchpath: [file://verl/trainer/config]}\n"
        "defaults: [ppo_trainer, _self_]\n"
        "data: {max_response_length: 77, train_batch_size: 16}\n"
        "actor_rollout_ref: {rollout: {n: 3}}\n"
    )
    command = f"{PPO} --config-path={files} --config-name=own data.train_files={files}/train.parquet"
    migration = read_verl_command(f"{command} data.train_batch_size=8 algorithm.adv_estimator=grpo")
    options = migration.options
    assert (options["prompts_per_step"], options["rollout"]["group_size"]) == (8, 3)
    assert options["rollout"]["max_completion_tokens"] == 77
    assert migration.unsupported == []
    assert any("own.yaml" in note for note in migration.notes)
    (files / "own.yaml").write_text("defaults: [ppo_trainer, other]\ndata: {max_response_length: 77}\n")
    assert "--config-name" in {each.option for each in read_verl_command(command).unsupported}


def test_the_punishment_of_overlong_completions_is_a_reward(files):
    section = "reward_model.reward_kwargs.overlong_buffer_cfg"
    words = f"reward_model.reward_manager=dapo +{section}.enable=True +{section}.len=16 +{section}.penalty_factor=0.5"
    words += f" +{section}.log=False +reward_model.reward_kwargs.max_resp_len=64 algorithm.filter_groups.enable=True"
    words += f" actor_rollout_ref.rollout.n=2 data.train_batch_size=4 data.train_files={files}/train.parquet"
    migration = read_verl_command(f"python3 -m recipe.dapo.main_dapo algorithm.adv_estimator=grpo {words}")
    assert migration.unsupported == []
    config = TrainConfig(**migration.tree)
    assert config.rollout.max_resamples == 10
    assert [reward.function for reward in config.rewards] == ["gsm8k", "soft_overlong_punishment"]
    assert config.rewards[1].weight == 0.5
    assert config.rewards[1].arguments == {"max_length": 64, "cache_length": 16}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python3 -m verl.trainer.main_ppo_sync a=1", "starts verl.trainer.main_ppo_sync, which is another program"),
        ("python3 main_ppo_split.py a=1", "starts main_ppo_split.py"),
        ("torchrun -m verl.trainer.sft_trainer a=1", "starts verl.trainer.sft_trainer"),
        (f"{PPO} data.seed=1,2", "several values"),
    ],
)
def test_another_program_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        read_overrides(text)


def test_a_second_command_is_named():
    found = read_overrides(f"{PPO} a=1\n# stage 2\n{PPO} a=2\nunread {{ }}\n")
    assert found.values == {"a": 1}
    assert any("Line 3 starts it again" in note for note in found.notes)
    assert read_overrides(f"while true; do {PPO} a=1; done").notes == []


def test_a_secret_of_the_environment_is_not_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("MODEL_PATH", "models/small")
    found = read_overrides(f"{PPO} a.key=$WANDB_API_KEY a.path=${{MODEL_PATH}}")
    assert found.values == {"a.path": "models/small"}
    assert found.unknown == {"a.key": ("$WANDB_API_KEY", ["WANDB_API_KEY"])}


def test_a_text_without_a_command_is_refused():
    with pytest.raises(ValueError, match=r"no command of verl\.trainer\.main_ppo"):
        read_overrides("python3 train.py\n")


@pytest.mark.slow
def test_a_command_becomes_a_file_that_trains(files, hf_policy, monkeypatch, capsys):
    monkeypatch.chdir(files)
    policy = hf_policy("llama")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    policy.trunk.save_pretrained("small")
    policy.tokenizer.save_pretrained("small")
    (files / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return sum(letter.isalpha() for letter in solution_str) / 20\n"
    )
    words = f"data.train_files={files}/train.parquet data.val_files={files}/test.parquet trainer.test_freq=1"
    words += " actor_rollout_ref.model.path=small data.train_batch_size=2 data.max_response_length=8"
    words += " actor_rollout_ref.rollout.n=4 algorithm.adv_estimator=grpo trainer.total_training_steps=2"
    words += " actor_rollout_ref.actor.optim.lr=1e-3 trainer.logger=console custom_reward_function.path=mine.py"
    assert main(["from-verl", f"{PPO} {words}"]) == 0
    printed = capsys.readouterr().out
    assert "written to run.yaml" in printed
    assert "Not carried over" not in printed
    assert main(["train", "run.yaml", "--threads", "1"]) == 0
    metrics = read_metrics(files / "checkpoints/verl_examples/gsm8k")
    assert [line["step"] for line in metrics if "reward/mean" in line] == [1, 2]

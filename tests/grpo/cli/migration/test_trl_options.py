"""What the values of a GRPOConfig are here: batches, steps, losses, defaults. Nothing is run."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from grpo.cli.migration import recorder
from grpo.cli.migration.recorder import plain
from grpo.cli.migration.trl_script import _Reading
from grpo.config.run import TrainConfig

DEFAULTS = {field.name: plain(field.default) for field in dataclasses.fields(GRPOConfig)}
ROWS = {"count": 96, "chat": False, "pictures": False, "solution": "answer", "source": None}
MODEL = {"name": "models/small", "arguments": {}, "lora": None, "type": "llama"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", str(tmp_path / "none"))

    def migrate(processes=1, others=None, model=MODEL, test=None, trainer=None, lora=None, **values):
        script = tmp_path / "train.py"
        script.write_text("def grade(completions, **_): ...\n")
        facts = {
            "values": DEFAULTS | values,
            "defaults": DEFAULTS,
            "of_other_versions": others or {},
            "refused": None,
            "model": model | ({"lora": lora} if lora else {}),
            "rewards": [{"file": str(script), "name": "grade", "module": ""}],
            "read": ["completions"],
            "tools": [],
            "environments": {},
            "data": {"train": ROWS} | ({"test": test} if test else {}),
            "tokenizer": None,
            "quantization": {},
            "others": trainer or {},
            "assigned": ["epsilon_low = 0.1"] if trainer == {} else [],
        }
        return _Reading(script, tmp_path / "data", facts, processes).migration

    return migrate


def lost(migration) -> dict:
    return {each.option: each.value for each in migration.unsupported}


def test_what_is_left_as_it_is_in_trl_is_what_trl_does(read):
    """Their defaults, where ours are others."""
    migration = read()
    config = TrainConfig(**migration.tree)
    assert migration.unsupported == []
    assert config.learner.schedule == "linear"
    assert config.learner.betas == (0.9, 0.999)
    assert config.learner.learning_rate == 1e-6
    assert config.learner.gradient_checkpointing
    assert config.rollout.max_completion_tokens == 512
    assert config.rollout.group_size == 8
    assert (config.prompts_per_step, config.steps) == (1, 288)
    assert config.loss.importance_correction == "none"
    assert (config.loss.loss_type, config.loss.kl_estimator, config.loss.scale_rewards) == ("dapo", "unbiased", "group")
    assert config.checkpoint.every == 500
    assert config.checkpoint.keep is None
    assert config.seed == 42
    assert config.log.trackers == []
    assert (config.data[0].template, config.data[0].prompt_column) == ("{prompt}", "prompt")
    assert config.eval.limit == 0


def updates_of_trl(values, processes, rows):
    """How many optimizer updates TRL makes: the length of its own sampler, cut as transformers' Trainer cuts it."""
    each, accumulated = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    group, times = values["num_generations"], values["num_iterations"]
    passes = values["steps_per_generation"] or accumulated
    if values["generation_batch_size"]:
        passes = values["generation_batch_size"] // (each * processes)
    generation = each * processes * passes
    sampler = RepeatSampler(list(range(rows)), group, generation // group, times * passes)
    micro_batches = len(sampler) // generation
    updates = math.ceil(values["num_train_epochs"] * math.ceil(micro_batches / accumulated))
    return updates, each * processes * accumulated


@pytest.mark.parametrize(
    ("values", "processes"),
    [
        ({"per_device_train_batch_size": 8}, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 1),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 4),
        ({"per_device_train_batch_size": 16, "num_generations": 4, "num_iterations": 2}, 1),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 4}, 1),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 32}, 2),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, 1),
        ({"per_device_train_batch_size": 8, "num_train_epochs": 1.5}, 1),
    ],
)
def test_as_many_updates_of_as_many_completions_as_trl_makes(read, values, processes):
    migration = read(processes, **values)
    config = TrainConfig(**migration.tree)
    updates, completions = updates_of_trl(DEFAULTS | values, processes, ROWS["count"])
    assert config.steps * config.learner.updates_per_batch == updates
    assert config.prompts_per_step * config.rollout.group_size == completions
    cut = {"steps_per_generation", "generation_batch_size"} & set(values)  # one generation serves several updates
    assert set(lost(migration)) == (set() if "gradient_accumulation_steps" in values else cut)


def test_max_steps_counts_updates_and_ours_counts_batches(read):
    migration = read(
        max_steps=100, num_iterations=4, warmup_steps=0.1, save_steps=40, eval_steps=20, eval_strategy="steps"
    )
    config = TrainConfig(**migration.tree)
    assert (config.steps, config.learner.updates_per_batch) == (25, 4)
    assert config.learner.warmup_steps == 3  # of 25: 10 updates
    assert config.checkpoint.every == 10


def test_what_is_off_in_another_way_is_not_said(read):
    assert read(generation_kwargs={}, debug=None, include_num_input_tokens_seen=False).unsupported == []


def test_a_group_that_an_update_cuts_is_said(read):
    migration = read(per_device_train_batch_size=4, steps_per_generation=4)
    assert {"gradient_accumulation_steps", "steps_per_generation"} == set(lost(migration))
    assert migration.options["prompts_per_step"] == 1


@pytest.mark.parametrize(
    ("values", "key", "ours"),
    [
        ({"loss_type": "dr_grpo"}, "loss.loss_type", "dr_grpo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss.epsilon_high", 5.0),
        ({"loss_type": "cispo"}, "loss.epsilon_high", 0.2),
        ({"scale_rewards": False}, "loss.scale_rewards", "none"),
        ({"scale_rewards": "batch"}, "loss.scale_rewards", "batch"),
        ({"beta": 0.04}, "loss.beta", 0.04),
        ({"beta": 0.04, "use_bias_correction_kl": False}, "loss.kl_estimator", "k3"),
        ({"importance_sampling_level": "sequence"}, "loss.importance_sampling_level", "sequence"),
        ({"use_vllm": True}, "loss.importance_correction", "sequence_mask"),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, "loss.importance_correction", "none"),
        ({"lr_scheduler_type": "cosine"}, "learner.schedule", "cosine"),
        ({"optim": "paged_adamw_8bit"}, "learner.optimizer", "adamw_8bit"),
        ({"max_grad_norm": 0.0}, "learner.max_grad_norm", 1e9),
        ({"bf16": True}, "dtype", "bfloat16"),
        ({"bf16": False}, "dtype", "float32"),
        ({"max_tool_calling_iterations": 3}, "max_turns", 4),
        ({"max_tool_calling_iterations": 0}, "max_turns", 1),
        ({"report_to": "tensorboard"}, "log.trackers", ["tensorboard"]),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "data.chat_template_kwargs", {"enable_thinking": False}),
        ({"others": {"warmup_ratio": 0.1}, "max_steps": 50}, "learner.warmup_steps", 5),
    ],
)
def test_a_value_of_theirs_is_this_one_here(read, values, key, ours):
    config = TrainConfig(**read(**values).tree).model_dump()
    for name in key.split("."):
        config = config[name]
    assert config == ours


@pytest.mark.parametrize(
    ("values", "reason", "changes"),
    [
        ({"top_p": 0.9}, "bias the gradient", True),
        ({"min_p": 0.1}, "bias the gradient", True),
        ({"loss_type": "vespo"}, "loss.loss_type is one of grpo, dr_grpo, dapo, bnpo, cispo, sapo", True),
        ({"loss_type": "bnpo"}, "micro-batch", True),
        ({"sync_ref_model": True}, "never changes", True),
        ({"lr_scheduler_type": "polynomial"}, "learner.schedule is one of linear, cosine, constant", True),
        ({"optim": "adafactor"}, "learner.optimizer is one of adamw, adamw_8bit", True),
        ({"shuffle_dataset": False}, "always shuffled", True),
        ({"router_aux_loss_coef": 0.01}, "balance.sequence_weight", True),
        ({"others": {"max_prompt_length": 256}}, "a prompt is never cut", True),
        ({"fp16": True}, "bfloat16 is taken", True),
        ({"max_completion_length": None}, "has a limit here", True),
        ({"trainer": {"callbacks": ["Mine"]}}, "own-loop.md", True),
        ({"trainer": {}}, "set the option by hand", True),
        ({"logging_steps": 1}, "every step", False),
        ({"push_to_hub": True}, "quartet export", False),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 0.5}, "{gpu_memory_utilization: 0.5}", False),
        ({"deepspeed": "zero3.json"}, "learner.parallel.fsdp", False),
    ],
)
def test_what_has_no_counterpart_is_said_with_the_reason(read, values, reason, changes):
    migration = read(**values)
    [each] = migration.unsupported
    assert reason in each.reason
    assert each.changes_training is changes
    assert f"# - {each.option}=" in migration.yaml()
    TrainConfig(**migration.tree)


def test_where_vllm_is_installed_it_samples(read, tmp_path, monkeypatch):
    (tmp_path / "python").touch()
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", str(tmp_path / "python"))
    migration = read(use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2)
    assert migration.options["rollout"]["backend"] == "vllm"
    assert migration.options["rollout"]["vllm"] == {"engine": {"tensor_parallel_size": 2}}
    assert lost(migration) == {"vllm_mode": "server"}  # quartet's own server takes its place


@pytest.mark.parametrize(("revision", "at"), [(None, ""), ("main", ""), ("v2", "@v2")])
def test_the_revision_of_a_model(read, revision, at):
    assert read(model_init_kwargs={"revision": revision}).options["model"] == f"models/small{at}"


def test_a_reward_that_is_only_logged_has_the_weight_0(read):
    assert [reward.weight for reward in TrainConfig(**read(reward_weights=[0.0]).tree).rewards] == [0.0]


def test_the_rows_of_a_revision_are_written(monkeypatch):
    """No name of data says which revision is meant."""
    monkeypatch.setattr(recorder, "hub_sources", {})

    class Rows:
        _fingerprint = "f"

    load = recorder.note_source(lambda *_, **__: Rows())
    load("owner/name", split="train", revision="v1")
    assert recorder.hub_sources == {}
    load("owner/name", split="train")
    assert recorder.hub_sources == {"f": {"name": "owner/name", "split": "train"}}


def test_a_secret_is_not_written(read):
    assert "hf_secret" not in read(hub_token="hf_secret").yaml()


def test_adapters(read):
    values = {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.05, "bias": "none"}
    lora = {"kind": "LoraConfig", "values": values, "defaults": {"lora_dropout": 0.0, "bias": "none"}}
    migration = read(lora=lora)
    assert migration.options["lora"] == {"rank": 8, "alpha": 16, "base": None, "targets": ["q_proj", "v_proj"]}
    assert lost(migration) == {"lora_dropout": 0.05}
    usual = read(lora=lora | {"values": {"r": 8, "lora_alpha": 8, "target_modules": None}})
    assert usual.options["lora"]["targets"] == ["q_proj", "v_proj"]  # peft's own choice for Llama
    everything = read(lora=lora | {"values": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}})
    assert "targets" not in everything.options["lora"]


def test_a_base_in_four_bits_is_that_of_adapters(read):
    class Bits:
        def to_dict(self):
            return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    model = MODEL | {"arguments": plain({"quantization_config": Bits(), "dtype": torch.bfloat16})}
    lora = {"kind": "LoraConfig", "values": {"r": 8, "target_modules": "all-linear"}, "defaults": {}}
    migration = read(model=model, lora=lora)
    assert migration.options["lora"]["base"] == "nf4"
    assert migration.options["dtype"] == "bfloat16"
    assert migration.unsupported == []
    assert lost(read(model=model)) == {"quantization_config": Bits().to_dict()}


def test_evaluation(read):
    test = ROWS | {"count": 12}
    migration = read(test=test, eval_strategy="steps", eval_steps=5, num_generations_eval=2)
    assert migration.options["eval"] == {"limit": 12, "split": "test", "samples": 2, "every": 5}
    assert "eval" not in read(test=test).options


def test_a_dataset_of_the_hub_keeps_its_name(read, tmp_path):
    source = {"name": "owner/name:main", "split": "train[:50]"}
    migration = read()
    assert Path(migration.options["data"]["name"]) == tmp_path / "data"
    ROWS["source"] = source
    try:
        assert read().options["data"]["name"] == "owner/name:main"
        assert read().options["data"]["split"] == "train[:50]"
    finally:
        ROWS["source"] = None

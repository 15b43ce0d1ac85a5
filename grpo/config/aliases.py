"""What TRL, transformers' Trainer, verl and unsloth call an option, and what it is here.

`MEANS` maps their name to ours (the first that the command has), with a note after a semicolon where the two differ.
`NOT_SUPPORTED` says why there is none. A name of verl's may be written with its whole path or any end of it:
`actor_rollout_ref.actor.optim.lr` is found as `lr`.
"""

from __future__ import annotations

from collections.abc import Collection

_EPOCHS = "training is counted in steps: an epoch is (training examples / prompts_per_step) steps"
_COMPLETIONS = "it counts prompts: a step trains on prompts_per_step × rollout.group_size completions"
_MICRO = "it counts tokens; micro-batches bound the memory and never change the gradient"
_LORA = "give lora.rank to switch adapters on"
_REWARD = "a list such as rewards: [{function: my_rewards.py:grade}]"

MEANS: dict[str, str] = {
    # the optimizer
    "learning_rate": "learner.learning_rate",
    "lr": "learner.learning_rate",
    "critic.optim.lr": "value.learning_rate",
    "lr_scheduler_type": "learner.schedule",
    "lr_scheduler": "learner.schedule",
    "lr_warmup_style": "learner.schedule",
    "warmup_style": "learner.schedule",
    "warmup_steps": "learner.warmup_steps",
    "lr_warmup_steps": "learner.warmup_steps",
    "warmup_ratio": "learner.warmup_steps; it counts steps",
    "lr_warmup_steps_ratio": "learner.warmup_steps; it counts steps",
    "adam_beta1": "learner.betas; both of them, such as [0.9, 0.95]",
    "adam_beta2": "learner.betas; both of them, such as [0.9, 0.95]",
    "grad_clip": "learner.max_grad_norm",
    "clip_grad": "learner.max_grad_norm",
    # how long, and how much at once
    "max_steps": "steps",
    "num_train_epochs": f"steps; {_EPOCHS}",
    "num_epochs": f"steps; {_EPOCHS}",
    "epochs": f"steps; {_EPOCHS}",
    "total_epochs": f"steps; {_EPOCHS}",
    "total_training_steps": "steps",
    "per_device_train_batch_size": f"prompts_per_step; {_COMPLETIONS}",
    "generation_batch_size": f"prompts_per_step; {_COMPLETIONS}",
    "train_batch_size": "prompts_per_step",
    "gen_batch_size": "prompts_per_step",
    "batch_size": f"prompts_per_step; {_COMPLETIONS}",
    "gradient_accumulation_steps": f"learner.tokens_per_micro_batch; {_MICRO}",
    "auto_find_batch_size": f"learner.tokens_per_micro_batch; {_MICRO}",
    "ppo_micro_batch_size": f"learner.tokens_per_micro_batch; {_MICRO}",
    "ppo_micro_batch_size_per_gpu": f"learner.tokens_per_micro_batch; {_MICRO}",
    "ppo_max_token_len_per_gpu": "learner.tokens_per_micro_batch",
    "ppo_mini_batch_size": "learner.updates_per_batch; it counts updates on each batch, which is not cut",
    "num_iterations": "learner.updates_per_batch",
    "ppo_epochs": "learner.updates_per_batch",
    "per_device_eval_batch_size": "eval.prompts_per_batch prompts_per_batch",
    "val_batch_size": "eval.prompts_per_batch prompts_per_batch",
    "gradient_checkpointing": "learner.gradient_checkpointing",
    "activation_checkpointing": "learner.gradient_checkpointing",
    "use_gradient_checkpointing": "learner.gradient_checkpointing",
    "enable_gradient_checkpointing": "learner.gradient_checkpointing",
    # rollouts
    "num_generations": "rollout.group_size samples",
    "n_samples_per_prompt": "rollout.group_size samples",
    "rollout.n": "rollout.group_size samples",
    "n": "rollout.group_size samples",
    "num_generations_eval": "eval.samples samples",
    "val_kwargs.n": "eval.samples samples",
    "temperature": "rollout.temperature",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_response_length": "rollout.max_completion_tokens",
    "response_length": "rollout.max_completion_tokens",
    "max_new_tokens": "rollout.max_completion_tokens",
    "max_tokens": "rollout.max_completion_tokens",
    "filter_groups.enable": "rollout.refill_draws; it is how often a tied group is sampled again",
    "filter_groups.max_num_gen_batches": "rollout.refill_draws",
    "dynamic_sampling": "rollout.refill_draws; it is how often a tied group is sampled again",
    # the loss
    "kl_coef": "loss.beta",
    "kl_loss_coef": "loss.beta",
    "use_kl_loss": "loss.beta; the KL penalty is on where it is above 0",
    "kl_loss_type": "loss.kl_estimator",
    "kl_penalty": "loss.kl_estimator",
    "use_bias_correction_kl": "loss.kl_estimator; the corrected one is called unbiased",
    "clip_ratio": "loss.epsilon",
    "clip_ratio_low": "loss.epsilon",
    "clip_ratio_high": "loss.epsilon_high",
    "clip_ratio_c": "loss.delta",
    "cliprange": "loss.epsilon",
    "entropy_coeff": "loss.entropy_coef",
    "loss_agg_mode": "loss.loss_type; token-mean is dapo, seq-mean-token-mean grpo, seq-mean-token-sum-norm dr_grpo",
    "loss_mode": "loss.loss_type",
    "adv_estimator": "loss.advantage; verl's grpo is group_relative",
    "norm_adv_by_std_in_grpo": "loss.scale_rewards; group divides by the standard deviation, none does not",
    "gamma": "value.gamma",
    "lam": "value.lam",
    "vllm_importance_sampling_correction": "loss.importance_correction",
    "vllm_importance_sampling_mode": "loss.importance_correction",
    "vllm_importance_sampling_cap": "loss.importance_clip_max",
    "vllm_importance_sampling_clip_max": "loss.importance_clip_max",
    "vllm_importance_sampling_clip_min": "loss.importance_clip_min",
    "rollout_is": "loss.importance_correction",
    "rollout_is_threshold": "loss.importance_clip_max",
    "router_aux_loss_coef": "balance.sequence_weight; DeepSeek-V3 uses balance.bias_rate",
    # rewards and data
    "reward_funcs": f"rewards; {_REWARD}",
    "reward_functions": f"rewards; {_REWARD}",
    "custom_reward_function.path": f"rewards; {_REWARD}",
    "custom_reward_function.name": f"rewards; {_REWARD}",
    "reward_manager": f"rewards; {_REWARD}",
    "reward_weights": "rewards[].weight; each reward has its own",
    "reward_model_path": "reward_models[].model",
    "reward_model_name_or_path": "reward_models[].model",
    "reward_model.model.path": "reward_models[].model",
    "dataset": "data.name data",
    "dataset_name": "data.name data",
    "dataset_path": "data.name data",
    "train_files": "data.name data",
    "train_file": "data.name data",
    "val_files": "data.name data; a folder with train.jsonl and test.jsonl holds both",
    "dataset_train_split": "data.split split",
    "dataset_test_split": "eval.split split",
    "eval_dataset": "eval.split split",
    "prompt_key": "data.prompt_column prompt_column",
    "dataset_text_field": "data.prompt_column prompt_column",
    "max_train_samples": "data.limit limit",
    "train_max_samples": "data.limit limit",
    "val_max_samples": "eval.limit limit",
    "max_eval_samples": "eval.limit limit",
    "chat_template": "data.template template; chat takes the model's own",
    "apply_chat_template": "data.template template; chat takes the model's own",
    # the model
    "model_name": "model",
    "model_name_or_path": "model",
    "model.path": "model",
    "model_path": "model",
    "pretrain": "model",
    "bf16": "dtype; float32 or bfloat16",
    "torch_dtype": "dtype; float32 or bfloat16",
    "mixed_precision": "dtype; float32 or bfloat16",
    "use_cpu": "device",
    "no_cuda": "device",
    "random_state": "seed",
    "data_seed": "seed",
    "use_peft": f"lora.rank; {_LORA}",
    "use_lora": f"lora.rank; {_LORA}",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "max_lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "lora_target_parameters": "lora.targets; experts names the routed ones",
    # the run
    "save_steps": "checkpoint.every",
    "save_freq": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.keep_best",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "evaluation_strategy": "eval.every",
    "test_freq": "eval.every",
    "do_eval": "eval.limit",
    "eval_on_start": "eval.limit; every evaluated run is also evaluated before its first step",
    "val_before_train": "eval.limit; every evaluated run is also evaluated before its first step",
    "log_completions": "log.table_every; every completion is kept in rollouts/",
    "num_completions_to_print": "log.table_every; every completion is kept in rollouts/",
    "report_to": "log.trackers",
    "logger": "log.trackers",
    "run_name": "output_dir; the run has the name of its folder",
    "experiment_name": "output_dir; the run has the name of its folder",
    "default_local_dir": "output_dir",
    "resume_from_checkpoint": "--resume; on the command line, --resume auto or a checkpoint's folder",
    "resume_mode": "--resume; on the command line, --resume auto or a checkpoint's folder",
    "resume_from_path": "--resume; on the command line, --resume auto or a checkpoint's folder",
}

_PROMPTS = "a prompt is never cut: one that leaves no room for its completion is refused before training"
_BIASED = "it cuts the distribution, so the sampled tokens are no longer the policy's and bias the gradient"
_UPLOADS = "quartet uploads nothing: `quartet export RUN DST` writes a folder, with a model card, that you can upload"
_ENGINE = "rollouts are sampled by quartet's own engine (rollout.workers spreads them over Ray workers)"
_LAUNCH = "processes and devices are chosen when accelerate starts quartet: `accelerate launch -m grpo train ...`"
_QUANTISED = "packed weights cannot be trained; lora.rank and dtype: bfloat16 save memory"
_NO_TRAINER = "quartet's own loop takes the place of transformers' Trainer and has no such switch"
_VALUE_HEAD = "the value head reads the policy's hidden states (loss.advantage: gae), so there is no model of its own"
_STEPS = "every step is written to metrics.jsonl and shown in one line"
_PROJECT = "a tracker is named in log.trackers, and the run has the name of output_dir"
_REFERENCE = "the reference of loss.beta is the policy that the run starts from, and it never changes"
_ONE_BATCH = "a step samples once and learns once; learner.updates_per_batch is the number of updates on the same batch"
_ENTROPY = "the entropy bonus has a fixed weight, loss.entropy_coef"

# Reason: names.
_WHY: dict[str, str] = {
    _BIASED: "top_p top_k min_p repetition_penalty",
    _PROMPTS: "max_prompt_length truncation filter_overlong_prompts max_seq_length",
    "the length of a completion is rollout.max_completion_tokens, and a prompt is never cut": "max_length",
    "a rollout is fixed by temperature, length limit and seed, so that it can be repeated": "generation_kwargs",
    _ENGINE: """use_vllm fast_inference cache_implementation use_transformers_paged rollout.name enforce_eager
        gpu_memory_utilization tensor_model_parallel_size use_transformers_continuous_batching
        transformers_continuous_batching_config ds3_gather_for_generation""",
    _UPLOADS: "push_to_hub log_completions_hub_repo",
    _LAUNCH: """deepspeed local_rank n_gpus_per_node nnodes parallelism_config accelerator_config param_offload
        optimizer_offload ulysses_sequence_parallel_size""",
    _QUANTISED: "load_in_4bit load_in_8bit load_in_fp8 use_bnb_nested_quant",
    "dtype is float32 or bfloat16": "fp16 fp16_full_eval bf16_full_eval tf32",
    "every weight is trained unless lora.rank is given": "full_finetuning",
    "sampler and learner must compute the same: adapters are plain LoRA": "lora_dropout use_dora use_rslora",
    "lora.targets names everything that is trained": "lora_modules_to_save lora_task_type",
    "the optimizer is AdamW, with moments in fp32": "optim optim_args optim_target_modules adam_epsilon",
    "learner.schedule is constant, linear or cosine, and has no more settings": "lr_scheduler_kwargs",
    _STEPS: "logging_steps logging_strategy logging_first_step logging_nan_inf_filter",
    _PROJECT: "project project_name",
    _REFERENCE: "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    _ONE_BATCH: "steps_per_generation num_mini_batches",
    "the KL penalty is part of the loss (loss.beta), never of the reward": "use_kl_in_reward",
    _ENTROPY: "entropy_target use_adaptive_entropy entropy_coef_delta entropy_coef_max entropy_coef_min",
    "the sampler's mismatch is corrected by loss.importance_correction": "off_policy_mask_threshold",
    "prompts are always shuffled, by seed": "shuffle_dataset",
    "data.name takes a hub id, a folder or a file; save the configuration that you want as a file": "dataset_config",
    "all data is checked before training starts": "dataset_streaming",
    "code that comes with a model is never run": "trust_remote_code",
    "the options of a model are dtype and device": "model_init_kwargs",
    "model takes a folder: download the revision that you want, and give its folder": "model_revision",
    "groups are always packed, with their prompt once": "packing padding_free use_remove_padding",
    "quartet chooses its kernels itself": "attn_implementation use_liger_kernel torch_compile",
    "there is no dropout: sampler and learner must compute the same": "disable_dropout",
    "log-probabilities are always computed in fp32": "cast_lm_head_to_fp32",
    _VALUE_HEAD: "critic.model.path critic_warmup",
    "a completion is one turn; there are no tools yet": "max_tool_calling_iterations",
    _NO_TRAINER: """activation_checkpointing_kwargs average_tokens_across_devices batch_eval_metrics
        chat_template_kwargs debug disable_tqdm do_predict do_train enable_jit_checkpoint eval_accumulation_steps
        eval_delay eval_do_concat_batches eval_use_gather_object full_determinism gradient_checkpointing_kwargs
        greater_is_better ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
        label_smoothing_factor length_column_name liger_kernel_config log_level log_level_replica log_multimodal
        log_on_each_node log_unique_prompts neftune_noise_alpha pad_to_multiple_of prediction_loss_only
        remove_unused_columns restore_callback_states_from_checkpoint save_on_each_node save_only_model
        skip_memory_metrics torch_compile_backend torch_compile_mode torch_empty_cache_steps
        train_sampling_strategy use_cache""",
}
NOT_SUPPORTED: dict[str, str] = {name: why for why, names in _WHY.items() for name in names.split()}
FAMILIES: dict[str, str] = {
    **{"vllm_": _ENGINE, "sglang_": _ENGINE, "hub_": _UPLOADS, "trackio_": _PROJECT, "fsdp": _LAUNCH, "ddp_": _LAUNCH},
    **{"dataloader_": "the data is read once, before training", "bnb_": _QUANTISED},
    "vespo_": "loss.loss_type has no vespo",
}
# `quartet sft` trains by the options of its warm start; the learner's of the same names change nothing there.
_OF_SFT = {
    "learner.learning_rate": "warm_start.learning_rate",
    "learner.schedule": "warm_start.schedule",
    "learner.warmup_steps": "warm_start.warmup_steps",
    "prompts_per_step": "warm_start.batch_size",
    "steps": "warm_start.steps",
}


def hint(name: str, known: Collection[str]) -> str | None:
    """What to say to somebody who gave `name`, an option of another trainer, to a command that has the `known` ones.

    None where the name is no other trainer's, or means something that this command does not have.

    >>> hint("num_generations", ["steps", "rollout.group_size"])
    'did you mean rollout.group_size?'
    >>> hint("use_vllm", [])[:22]
    'not supported, because'
    """
    section, dot, _ = name.partition(".")
    ends = [name.split(".", start)[start] for start in range(name.count(".") + 1)]
    for end in ends:
        if end in MEANS:
            keys, _, note = MEANS[end].partition("; ")
            found = next((key for target in keys.split() for key in _here(target, known)), None)
            if found and dot and (own := f"{section}.{found.rpartition('.')[2]}") in known:
                found = own  # mtp.lr is mtp.learning_rate
            return found and f"did you mean {found}?" + (f" ({note})" if note else "")
        family = next((why for prefix, why in FAMILIES.items() if end.startswith(prefix)), None)
        if reason := NOT_SUPPORTED.get(end, family):
            return f"not supported, because {reason}"
    return None


def _here(target: str, known: Collection[str]) -> list[str]:
    """The options of this command that may be what `target`, an option of `quartet train`, is there; the best first."""
    if target.startswith("--"):
        return [target]
    is_sft = "warm_start.steps" in known and "steps" not in known
    last = target.rpartition(".")[2]
    names = [_OF_SFT[target]] if is_sft and target in _OF_SFT else []
    return [key for key in (*names, target, f"head.{last}", f"recovery.{last}", last) if key in known]

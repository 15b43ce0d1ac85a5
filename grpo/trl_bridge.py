"""TRL's GRPOTrainer learns, our pool samples: `GRPOTrainer(model=policy.trunk, rollout_func=rollout_func(policy))`.

Rewards need no bridge: `load_reward("gsm8k")` and `load_reward("file.py:function")` go into `reward_funcs` as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from grpo.config.sampling import SamplingOptions
from grpo.learner.optimizer import freeze_exact_parts
from grpo.run.metrics import rollout_metrics
from grpo.task.sampling import sampling_params
from policies.attention import sees_prompts_whole
from policies.lora import ADAPTER
from policies.policy import Policy, checksum
from rollout.cost_table import Workload
from rollout.group import Prompt, RolloutGroup
from rollout.pool import Pool, PoolOptions
from rollout.workers.kinds import open_pool

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

METRICS = {"draft/mtp_head_age": "steps of TRL's trainer since the MTP head was last trained (TRL bridge only), count"}
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}  # trainer attributes
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")
# what makes an adapter more than W + ΔW, or trains weights outside of adapters
BEYOND_DELTA = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")


class BridgeError(ValueError):
    """Our pool cannot sample for this trainer; the message names the setting and the way out."""


class rollout_func:
    """Samples for TRL's GRPOTrainer; a policy of the DeepSeek-V3 form drafts with its MTP head.

    Every call publishes the trainer's current weights (LoRA adapters merged) to the pool, then samples at the trainer's
    `temperature`, `max_completion_length`, `num_generations` and `args.seed`. The noise is keyed by `state.global_step`
    and by the number of the call within that step. Returned are `prompt_ids`, `completion_ids` (stop token included),
    `logprobs` (of the temperature-scaled policy) and, for the rewards, the column `finish_reason`.

    TRL itself reads the log-probabilities for vLLM only, so its loss does not correct a sampler of another precision.
    Hence `dtype=None`: bfloat16 where the trainer autocasts to it, else the precision of the weights.

    TRL does not train the MTP head. Tokens stay exact, but drafts are accepted less where the policy moves away from
    it: `draft/acceptance_depth_*` and `draft/mtp_head_age` are logged by the trainer, and every `warn_every` steps a
    warning says how the acceptance has changed. `draft_tokens` means what `rollout.draft_tokens` does in a config.

    Raises BridgeError for drafts without a draft head, and in the first call for a trainer that trains another model or
    asks for what would bias the gradient (top-p and the like).

    >>> policy = Policy.load("models/smollm2-135m-mla")
    >>> rollout = rollout_func(policy)
    >>> trainer = GRPOTrainer(
    ...     model=policy.trunk,
    ...     processing_class=policy.tokenizer,
    ...     reward_funcs=[load_reward("gsm8k")],
    ...     rollout_func=rollout,
    ...     args=GRPOConfig("runs/trl", bf16=False),
    ...     train_dataset=dataset,      # columns prompt and answer
    ... )
    >>> trainer.train()
    >>> policy.save("runs/trl/policy")  # with the MTP head, adapters merged
    """

    def __init__(
        self,
        policy: Policy,
        *,
        draft_tokens: int | None = None,
        workers: int = 0,
        threads_per_worker: int = 1,
        prompts_per_shard: int = 8,
        dtype: torch.dtype | None = None,
        warn_every: int = 50,
    ) -> None:
        if draft_tokens and policy.mtp is None:
            raise BridgeError(f"rollout_func: draft_tokens={draft_tokens}, but the policy has no MTP head; use 0")
        if sees_prompts_whole(policy.config):
            raise BridgeError(
                "rollout_func: prompt_attention=bidirectional in config.json: TRL's trainer would learn with causal "
                "prompts; use quartet train"
            )
        if warn_every < 1:
            raise BridgeError(f"rollout_func: warn_every={warn_every} must be 1 step or more")
        self.policy, self.draft_tokens, self.dtype = policy, draft_tokens, dtype
        self.options = PoolOptions(workers, threads=threads_per_worker, prompts_per_shard=prompts_per_shard)
        self.head_age = HeadAge(warn_every)
        self.pool: Pool | None = None
        self.syncs = 0
        self.calls: dict[str, tuple[int, int]] = {}  # mode: (global step, calls within it)
        freeze_exact_parts(policy)

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list]:
        """Returns what TRL asks for: a completion of every entry of `prompts`, where each comes G times in a row."""
        mode = "train" if trainer.model.training else "eval"
        size: int = getattr(trainer, "num_generations" if mode == "train" else "num_generations_eval")
        if self.pool is None:
            self._check(trainer)
            dtype = self.dtype or (torch.bfloat16 if trainer.args.bf16 else self.policy.lm_head.dtype)
            self.pool = open_pool(self.policy, replace(self.options, dtype=dtype))
            if self.draft_tokens is None and self.policy.mtp is not None:
                rows = self.options.prompts_per_shard * size
                self.pool.use_costs(None, Workload(rows, trainer.max_completion_length or Workload.completion_tokens))
        step = trainer.state.global_step
        last, count = self.calls.get(mode, (step, 0))
        call = count if last == step else 0
        self.calls[mode] = step, call + 1
        self.syncs += 1
        self.pool.sync_weights(self.policy.synced_weights(), self.syncs)
        longest, drafts = trainer.max_completion_length, self.draft_tokens
        options = SamplingOptions(temperature=trainer.temperature, max_completion_tokens=longest, draft_tokens=drafts)
        params = sampling_params(self.policy, options, size, trainer.args.seed).at(step, call)
        params = replace(params, stop_token_ids=tuple(trainer.eos_token_ids))
        groups = self.pool.sample(self._encode(prompts, size, mode, trainer), params)
        self._report(groups, step, trainer)
        completions = [completion for group in groups for completion in group.completions]
        return {
            "prompt_ids": [group.prompt.token_ids for group in groups for _ in group.completions],
            "completion_ids": [completion.token_ids for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
        }

    def close(self) -> None:
        """End the pool's workers."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _encode(self, prompts: list[Any], size: int, mode: str, trainer: GRPOTrainer) -> list[Prompt]:
        """Makes one Prompt a group, tokenised as TRL does it. Its place in the whole batch keys its noise."""
        chosen = prompts[::size]
        if len(prompts) % size or any(prompts[i] != chosen[i // size] for i in range(len(prompts))):
            raise BridgeError(
                f"this process got {len(prompts)} prompts that are no whole groups of num_generations={size}; make "
                "per_device_train_batch_size * steps_per_generation (and per_device_eval_batch_size) a multiple of it"
            )
        tokenizer = trainer.processing_class
        if isinstance(chosen[0], str):
            encoded = tokenizer(text=chosen)
        else:
            options: Any = trainer.chat_template_kwargs
            look = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            encoded = tokenizer.apply_chat_template(chosen, **look, **options)
        first = trainer.accelerator.process_index * len(chosen)
        chats = [None if isinstance(prompt, str) else prompt for prompt in chosen]
        return [
            Prompt(f"trl/{mode}/{first + i}", str(chosen[i]), list(ids), messages=chats[i])
            for i, ids in enumerate(encoded["input_ids"])
        ]

    def _report(self, groups: Sequence[RolloutGroup], step: int, trainer: GRPOTrainer) -> None:
        metrics = {name: v for name, v in rollout_metrics(groups, []).items() if name.startswith("draft/")}
        acceptance = [value for name, value in metrics.items() if "acceptance_depth" in name]
        if self.policy.mtp is not None and acceptance:
            if warning := self.head_age.note(step, self.policy.mtp.state_dict(), acceptance):
                logger.warning(warning)
            metrics["draft/mtp_head_age"] = float(self.head_age.steps(step))
        for name, value in metrics.items():
            trainer._log_metric(name, value)  # what reward functions get as `log_metric`

    def _check(self, trainer: GRPOTrainer) -> None:
        if trainer.accelerator.distributed_type in SHARDED:
            raise BridgeError(
                f"rollout_func: the trainer shards its weights ({trainer.accelerator.distributed_type}); publishing "
                "needs them whole, on one device or with data parallelism"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            _check_adapter(model)
            model = model.get_base_model()
        if model is not self.policy.trunk:
            raise BridgeError(
                "rollout_func: the trainer trains another model than this policy's; use GRPOTrainer(model=policy.trunk)"
            )
        values = {name: getattr(trainer, name) for name in PLAIN_SAMPLING}
        wrong = {name: value for name, value in values.items() if value not in (PLAIN_SAMPLING[name], None)}
        if trainer.args.generation_kwargs:
            wrong["generation_kwargs"] = trainer.args.generation_kwargs
        if wrong:
            name, value = next(iter(wrong.items()))
            raise BridgeError(
                f"{name}={value!r}: our pool samples from the whole temperature-scaled policy, since anything else "
                f"biases the gradient; drop {', '.join(wrong)} from GRPOConfig"
            )
        if not trainer.temperature > 0:
            raise BridgeError(f"temperature={trainer.temperature}: GRPO samples; use a positive number")
        if trainer.tools or trainer.environment_factories:
            raise BridgeError("rollout_func: TRL would generate the turns after a tool call itself; drop the tools")


def _check_adapter(model: PeftModel) -> None:
    adapter = model.peft_config[ADAPTER] if model.active_adapter == ADAPTER else None
    if not isinstance(adapter, LoraConfig):
        other = type(adapter).__name__ if adapter else f"an adapter called {model.active_adapter!r}"
        raise BridgeError(f"peft_config: {other} cannot be merged for sampling; use a LoraConfig called {ADAPTER!r}")
    if extra := [name for name in BEYOND_DELTA if getattr(adapter, name, None)]:
        raise BridgeError(
            f"peft_config: {extra[0]}={getattr(adapter, extra[0])!r} trains more than W + BA, which is all that our "
            "pool is sent; drop it, or train every weight (no peft_config)"
        )


class HeadAge:
    """Tells how far the policy has moved on since its draft head was trained, and what that did to the acceptance."""

    def __init__(self, warn_every: int) -> None:
        self.warn_every = warn_every
        self.trained_at = self.warned_at = 0
        self.trained_checksum = ""
        self.fresh: list[float] = []  # acceptance per depth when the draft head was last trained

    def steps(self, step: int) -> int:
        return step - self.trained_at

    def note(self, step: int, head: Mapping[str, Tensor], acceptance: list[float]) -> str | None:
        """Notes weights and acceptance of the draft head at a step; returns what there is to warn of, now and then."""
        if (now := checksum(head)) != self.trained_checksum:
            self.trained_checksum, self.trained_at, self.warned_at, self.fresh = now, step, step, acceptance
        if step - self.warned_at < self.warn_every:
            return None
        self.warned_at = step
        then, later = (" ".join(f"{value:.2f}" for value in values) for values in (self.fresh, acceptance))
        return (
            f"the MTP head is {self.steps(step)} steps older than the policy, since TRL does not train it. Drafts "
            f"accepted per depth: {then} at step {self.trained_at}, {later} at step {step}. Tokens stay exact, but "
            "where acceptance falls sampling gets slower: save the policy and train it with quartet, draft head too, "
            "or use draft_tokens=0"
        )

"""Every option of a run, with its meaning and its default. The reference page is generated from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from grpo.algorithm.losses import CorrectionMode, KLEstimator, Level, LossType
from grpo.config.options import Options
from rewards.group_score import FailurePolicy
from rewards.protocol import RewardError

Advantage = Literal[
    "group_relative", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae", "rank_softmax"
]


class DataOptions(Options):
    """Where prompts come from."""

    name: str = "word_problems"
    """`word_problems` (built in), `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder with train.jsonl and test.jsonl, or
    one data file."""
    split: str = "train"
    """The split that is trained on; a test split is refused here."""
    levels: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    """Difficulty levels of `word_problems`, 1 to 4."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a reasoning_gym task, such as {max_animals: 4}."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many examples only."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the examples for evaluation instead of a split of its own. Each problem's content decides,
    so that appended rows move no other row."""
    holdout_seed: int = 0
    """Another number holds out other problems. The run's `seed` does not, so that all seeds can be compared."""
    prompt_column: str = "question"
    """The column that becomes the prompt: text, or chat messages (template: chat)."""
    solution_column: str = "answer"
    """The column with the gold solution; rewards receive it under its own name."""
    template: str = "{question}\n"
    """A format string over the data's columns, or `chat` for the model's own chat template."""
    system_prompt: str | None = None
    """System message in front of every chat prompt (template: chat)."""
    user_turn: str | None = None
    """template: chat: a format string for the user's message, such as "Be brief.\\n\\n{examples}Question: {question}".
    The worked examples go where {examples} is, each in the form of what follows it; without it they are turns."""
    few_shot: int = Field(default=0, ge=0)
    """Worked examples from the training split in front of every prompt."""


class RolloutOptions(Options):
    """How completions are sampled."""

    group_size: int = 8
    """Completions per prompt; GRPO compares them with each other, so at least 2."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the learner scores at the same one. There is no top-p or top-k: they bias the gradient."""
    max_completion_tokens: int = Field(default=256, ge=1)
    """A completion ends here if it has not stopped by itself."""
    draft_tokens: int | None = Field(default=None, ge=0)
    """MTP drafts per forward of the trunk, 0 for none; null chooses by measured cost. Never changes a token."""
    accept: Literal["exact", "margin"] = "exact"
    """`exact` alone: what `quartet eval` and `quartet sample` may take unverified (margin) is refused for training."""
    workers: int = Field(default=0, ge=0)
    """Ray rollout workers; 0 samples in this process, without Ray."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of each Ray worker."""
    prompts_per_shard: int = Field(default=8, ge=1)
    """Prompts whose groups are sampled together; the number of workers never changes a token."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that a Ray worker may take for a shard; then it is killed, and a new one samples the same tokens."""
    refill_draws: int = Field(default=0, ge=0)
    """Dynamic sampling: tied groups are sampled again, at most so many times a step; 0 keeps them."""
    refill_prompts: Literal["new", "same"] = "new"
    """What takes a tied group's place: the next prompts of the data, or the same prompt with new noise."""

    @field_validator("accept")
    @classmethod
    def _lossless(cls, accept: str) -> str:
        if accept == "margin":
            raise ValueError(
                "takes tokens that the policy has not verified, which no correction can repair in training; use exact "
                "(quartet eval and quartet sample have margin)"
            )
        return accept

    @field_validator("group_size")
    @classmethod
    def _compares(cls, group_size: int) -> int:
        if group_size < 2:
            raise ValueError("gives every completion a zero advantage; use 2 or more")
        return group_size


class RewardOptions(Options):
    """One reward function."""

    function: str
    """A built-in name (`gsm8k`, `gsm8k_format`, ...) or `path/to/file.py:function`."""
    weight: float = 1.0
    """Its weight in the score."""
    name: str | None = None
    """Its name in metrics; the function's own by default."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the data for parameters of another name, such as {reference: answer}."""
    chat: bool = False
    """Hand prompts and completions to it as chat messages instead of strings."""


class RewardModelOptions(Options):
    """A model whose scores are a column for the rewards: read it with the built-in reward `column`, or by its name."""

    name: str = Field(pattern=r"^[A-Za-z]\w*$")
    """The column's name; also how the scores are called in metrics and in the rollout record."""
    model: str
    """A checkpoint folder (safetensors), a run folder or a hub id; frozen, on the policy's device."""
    kind: Literal["classifier", "perplexity"] = "classifier"
    """`classifier`: a logit of any sequence classifier. `perplexity`: of the completion under a language model, whose
    own tokenizer reads it; 1 or more, so it wants a negative weight."""
    label: int | None = Field(default=None, ge=0)
    """classifier: the label whose logit is the score; needed where there is more than one."""
    chat: bool = False
    """classifier: read question and completion through the model's own chat template, instead of as one text."""
    batch_size: int = Field(default=8, ge=1)
    """Completions of one forward."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> RewardModelOptions:
        if self.kind == "perplexity" and (self.label is not None or self.chat):
            raise ValueError("label and chat are for kind: classifier; drop them")
        return self


class ScoringOptions(Options):
    """How rewards are run, and what happens when one fails."""

    on_error: str = "abort"
    """`abort`, `drop_sample`, `drop_group` or `score=x`: a failing reward is never silently a zero."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that a reward may take per batch, and per completion when the batch is rerun one by one."""
    workers: int = Field(default=1, ge=1)
    """Processes that run rewards."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that rewards may read, such as [OPENAI_API_KEY], besides the usual few (PATH, HOME, LANG,
    PYTHONPATH, OMP_NUM_THREADS, HF_HOME, ...). The list is written to config.yaml, the values are not."""

    @field_validator("on_error")
    @classmethod
    def _is_a_policy(cls, on_error: str) -> str:
        try:
            FailurePolicy.parse(on_error)
        except RewardError:
            raise ValueError("choose abort, drop_sample, drop_group or score=<number>, such as score=0") from None
        return on_error


class LossOptions(Options):
    """The policy loss; names, meanings and defaults are TRL's where both have them."""

    loss_type: LossType = "dapo"
    """Aggregation and surrogate: grpo, dr_grpo, dapo, bnpo, cispo, sapo, or reinforce (−Â·log π, a token mean)."""
    importance_sampling_level: Level = "token"
    """`token`, or `sequence` (GSPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Which standard deviation divides a group's centred rewards."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: sum and normalise, or normalise each first."""
    advantage: Advantage = "group_relative"
    """The estimator. `gae` is PPO, `rank_softmax` weighs GAE by rank in the group (loss_type reinforce); both use the
    value head (`value`)."""
    epsilon: float = Field(default=0.2, ge=0)
    """Clip range below 1."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """Clip range above 1; epsilon by default (DAPO uses 0.28; CISPO reads it as the cap itself)."""
    delta: float | None = Field(default=None, gt=1)
    """Upper bound of the ratio for negative advantages (two-sided clipping)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty towards the reference policy; 0 needs no reference."""
    kl_estimator: KLEstimator = "unbiased"
    """Estimator of that KL."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: float = Field(default=1.0, ge=0, le=1)
    """Train on this share of the step's tokens, highest entropy first (TRL: of each micro-batch); 0 keeps the top one.
    Below 1 it costs one more forward an update."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""
    importance_correction: CorrectionMode | Literal["auto", "none"] = "auto"
    """Correction for a sampler that differs from the learner; `auto` is token_truncate below float32, else none (TRL
    with vLLM: always sequence_mask)."""
    importance_clip_max: float = Field(default=3.0, gt=0)
    """Largest weight of the importance correction."""
    importance_clip_min: float | None = Field(default=None, ge=0)
    """Smallest weight of the importance correction."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Temperature of SAPO's gate for positive advantages."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Temperature of SAPO's gate for negative advantages."""

    @model_validator(mode="before")
    @classmethod
    def _third_phase(cls, given: Any) -> Any:
        """rank_softmax updates by -mean(weight · Â · log π), unless another loss is asked for by name."""
        if isinstance(given, dict) and given.get("advantage") == "rank_softmax":
            return {"loss_type": "reinforce"} | given
        return given

    @model_validator(mode="after")
    def _penalty_has_an_estimator(self) -> LossOptions:
        if self.beta and self.kl_estimator == "none":
            raise ValueError(
                f"beta={self.beta} weighs a KL penalty, but kl_estimator=none computes none: choose k1, k2, k3 or "
                "unbiased, or drop beta"
            )
        return self


class ValueOptions(Options):
    """The value head of `loss.advantage: gae` and `rank_softmax`; PPO's names and defaults. Never published."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the head."""
    hidden_size: int = Field(default=128, ge=0)
    """Width of its hidden layer; 0 is a linear head."""
    train_trunk: bool = False
    """Let the value loss train the trunk as well, times vf_coef; else the head reads detached hidden states."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss in the trunk's gradient; the head's own steps hardly depend on it."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """A value that moved further than this from its old one learns no further from the same batch."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ: 0 trusts the values, 1 the score alone."""
    whiten_advantages: bool = True
    """Advantages with mean 0 and standard deviation 1 over the step's tokens."""
    rank_temperature: float = Field(default=1.0, gt=0)
    """rank_softmax: weights are softmax(rank / this); a high one weighs all completions alike."""


class LearnerOptions(Options):
    """The optimizer and how a batch is cut."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate of the policy (LoRA wants about ten times that of full updates)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate over `steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer updates on each batch of rollouts; above 1 the old log-probabilities are computed first."""
    tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Padded tokens of one forward and backward; bounds memory, changes no gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    on_non_finite: Literal["abort", "skip"] = "abort"
    """What a non-finite loss or gradient does; the step is never taken, and the batch is written to the run folder."""
    max_skipped_in_a_row: int = Field(default=3, ge=1)
    """on_non_finite: skip gives up after so many."""
    routing_replay: bool = False
    """MoE: the learner's forward uses the experts that the sampler chose, for the prompt too."""


class LoraOptions(Options):
    """Low-rank adapters through peft."""

    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is alpha / rank · BA."""
    targets: list[str] | None = None
    """Module names, `experts` (the routed ones), `router`, and `mtp`: the draft head gets adapters on all of its layers
    instead of being trained whole. By default every linear layer of the trunk and the experts."""


class BalanceOptions(Options):
    """Keeping the routed experts equally busy: three mechanisms, alone or together, all off by default.

    They look at the tokens of completions. The bias is the same in a rollout and in all updates that learn from it.
    """

    bias_rate: float = Field(default=0.0, ge=0)
    """Step of the experts' bias after every step: up for those chosen less than the mean (0.001 in DeepSeek-V3)."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of -H(mean gate) + mean H(gate), summed over layers; its mean is over a micro-batch."""
    sequence_weight: float = Field(default=0.0, ge=0)
    """Weight of DeepSeek-V3's balance loss of each completion, summed over layers (0.0001 there)."""


class MTPOptions(Options):
    """Training of the draft head beside the policy, detached from it."""

    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the draft loss; 0 leaves the head as it is."""
    every: int = Field(default=1, ge=1)
    """Train the head every so many steps."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of a step's groups that the head learns from, another share every step; its cost shrinks with it."""
    depth: int = Field(default=4, ge=1)
    """Depths that are unrolled in training."""
    train_trunk: bool = False
    """`quartet sft` only: cross-entropy on the gold tokens through head and trunk (DeepSeek-V3; loss_weight 0.3 or 0.1
    there), instead of teaching the head alone."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the head."""


class WarmStartOptions(Options):
    """Supervised steps on the gold solutions before GRPO (and all of `quartet sft`)."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 skips the warm start."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay over the warm start."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    levels: list[int] | None = None
    """Levels of `word_problems` for the warm start; those of `data` by default."""
    strip_calculator_marks: bool = True
    """Drop GSM8K's `<<48/2=24>>` marks from the solutions."""


class CheckpointOptions(Options):
    """When to save and what to keep."""

    every: int = Field(default=50, ge=1)
    """Save every so many steps, and at the end."""
    keep: int | None = Field(default=2, ge=1)
    """How many checkpoints stay; null keeps all."""
    keep_best: bool = False
    """The best one stays too, and becomes `best_policy/`: by eval/accuracy, or by eval/reward_mean where the
    reward is no accuracy (evaluated steps are saved then), or by reward/mean over the `every` steps before it where
    nothing was evaluated. GRPO only."""


class CurriculumOptions(Options):
    """What GRPO meets first: short prompts, learnable prompts, short completions, shallow drafts. Off by default."""

    steps: int = Field(default=100, ge=1)
    """Everything below has grown to the whole by this step, in a straight line."""
    shortest_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training examples open at step 1, shortest gold solutions first; of the open ones the least seen."""
    by_difficulty: bool = False
    """Draw prompts ∝ p(1−p), p being the running share of a prompt's completions with full marks (1, what a gold
    solution gets where that is more, or what the reward declares); unseen: the mean."""
    completion_tokens: int | None = Field(default=None, ge=1)
    """Length limit of completions at step 1, growing to rollout.max_completion_tokens; null is that from the start."""
    draft_depth: int | None = Field(default=None, ge=1)
    """Depth of the draft head at step 1, growing to mtp.depth; null is that from the start."""


class EvalOptions(Options):
    """Held-out evaluation before, during and after training; off the training clock."""

    every: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps as well; null evaluates at the two ends only."""
    limit: int = Field(default=0, ge=0)
    """Held-out problems; 0 turns evaluation off."""
    samples: int = Field(default=1, ge=1)
    """Completions per problem at the sampling temperature; above 1, pass@k and majority votes too where there is an
    accuracy."""
    split: str | None = None
    """The held-out split; `heldout` for word_problems, `test` otherwise."""
    levels: list[int] | None = None
    """Levels of `word_problems`; those of `data` by default."""
    prompts_per_batch: int = Field(default=64, ge=1)
    """Problems that are sampled together."""


class LogOptions(Options):
    """What a person sees and what is kept."""

    table_every: int = Field(default=10, ge=1)
    """Show a table of sample completions every so many steps."""
    trackers: list[str] | None = None
    """Trackers of accelerate (`tensorboard`, `wandb`, ...); TensorBoard when installed, [] for none."""
    measure_speed: bool = False
    """At the end, time sampling with and without drafts on held-out prompts."""


class ModelOptions(Options):
    """What a policy is loaded from; shared by every command."""

    model: str = "tiny"
    """A preset (`tiny`), a checkpoint folder or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of learner and sampler; the optimizer keeps fp32 masters of bfloat16 weights."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this process. null is OMP_NUM_THREADS, else one for every 8 M parameters of the policy, as far as
    there are cores; a run that is resumed keeps its number."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""
    add_mtp: bool = False
    """Give a fresh MTP head to a DeepSeek-V3 checkpoint that has none."""
    seed: int = 0
    """Seed of everything: weights of a preset, data order, sampling noise."""


def gsm8k_reward() -> list[RewardOptions]:
    return [RewardOptions(function="gsm8k")]


class SftConfig(ModelOptions):
    """Supervised fine-tuning on prompts and gold solutions; the MTP head is trained beside the trunk."""

    # What `quartet sft --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.limit", "data.template", "data.prompt_column"),
        *("data.solution_column", "warm_start.steps", "warm_start.batch_size", "warm_start.learning_rate"),
        *("warm_start.schedule", "learner.tokens_per_micro_batch", "mtp.loss_weight", "mtp.depth", "rewards"),
        *("eval.limit", "rollout.max_completion_tokens", "checkpoint.every", "dtype", "threads", "seed"),
    )
    output_dir: Path
    """The run folder; the trained policy is written to `policy/` in it."""
    data: DataOptions = DataOptions()
    warm_start: WarmStartOptions = WarmStartOptions(steps=200)
    mtp: MTPOptions = MTPOptions()
    balance: BalanceOptions = BalanceOptions()
    learner: LearnerOptions = LearnerOptions()
    eval: EvalOptions = EvalOptions()
    rollout: RolloutOptions = RolloutOptions()
    rewards: list[RewardOptions] = Field(default_factory=gsm8k_reward, min_length=1)
    """Reward functions; the score is their weighted sum. The first one judges held-out completions: accuracy where its
    marks say right or wrong (`rewards.right_at`, or all of them 0 and 1), else the mean reward."""
    reward_models: list[RewardModelOptions] = Field(default_factory=list)
    """Models that score completions beside the policy."""
    reward: ScoringOptions = ScoringOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()


class TrainConfig(SftConfig):
    """GRPO, after an optional warm start: sample groups, score them, favour what scored above its group."""

    # What `quartet train --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.template", "rewards", "steps", "prompts_per_step"),
        *("rollout.group_size", "rollout.temperature", "rollout.max_completion_tokens", "rollout.workers"),
        *("learner.learning_rate", "learner.tokens_per_micro_batch", "loss.loss_type", "loss.beta", "lora.rank"),
        *("warm_start.steps", "eval.limit", "eval.every", "checkpoint.every", "dtype", "seed"),
    )
    steps: int = Field(default=100, ge=1)
    """Steps of GRPO; one step samples, scores and learns once."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per step; completions per step are this times rollout.group_size."""
    warm_start: WarmStartOptions = WarmStartOptions()
    lora: LoraOptions | None = None
    """Adapters; null updates every weight."""
    loss: LossOptions = LossOptions()
    value: ValueOptions = ValueOptions()
    curriculum: CurriculumOptions = CurriculumOptions()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.loss.epsilon_high is None and self.loss.loss_type == "cispo":
            raise ValueError("loss.epsilon_high: loss_type cispo needs it (the cap of the ratio, 5.0 in ScaleRL)")
        if self.loss.multi_objective_aggregation != "sum_then_normalize" and self.loss.advantage != "group_relative":
            raise ValueError(
                f"loss.multi_objective_aggregation=normalize_then_sum is for loss.advantage group_relative alone; "
                f"{self.loss.advantage} takes the weighted sum: use sum_then_normalize"
            )
        if self.mtp.train_trunk:
            raise ValueError("mtp.train_trunk: in GRPO the draft head never touches the trunk; use it in quartet sft")
        if self.eval.every and not self.eval.limit:
            raise ValueError(
                f"eval.every={self.eval.every} with eval.limit=0 evaluates nothing; set eval.limit, or drop it"
            )
        tokens, depth = self.curriculum.completion_tokens, self.curriculum.draft_depth
        if tokens is not None and tokens > (last := self.rollout.max_completion_tokens):
            raise ValueError(
                f"curriculum.completion_tokens={tokens} is where it begins; it ends at "
                f"rollout.max_completion_tokens={last}: use at most that"
            )
        if depth is not None and depth > self.mtp.depth:
            raise ValueError(
                f"curriculum.draft_depth={depth} is where it begins; it ends at mtp.depth={self.mtp.depth}: "
                "use at most that"
            )
        return self

"""What a run goes on from: its checkpoint, and the configuration that it must still have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config.run import LearningConfig, RunConfig, TrainConfig
from grpo.data.folders import run_of
from grpo.run import checkpoint
from grpo.run.checkpoint import Checkpoint
from rewards.config.names import sources_of
from rewards.config.options import dump_yaml, load
from rewards.config.yaml_file import differences, parse_yaml, read_yaml

if TYPE_CHECKING:
    from policies.policy import Policy

FREE_TO_CHANGE = (
    *("output_dir", "steps", "log", "checkpoint", "eval", "threads"),
    *("reward.timeout_s", "reward.pass_variables"),
    *("learner.workers", "learner.parallel", "program_timeout_s", "program_memory_mb"),
)
# Options that are gone, and without which a run would not go on to the same bits.
LEARNED = (
    *(
        "loss.",
        "value.",
        "curriculum.",
        "sft.",
        "mtp.",
        "cassette.",
        "distill.",
        "rewards[]",
        "data.held_out_seed",
    ),
    *("learner.on_non_finite", "rollout.threads_per_worker", "rollout.compile"),
)


def saved_state(
    config: RunConfig,
    *,
    resume: str | None,
    force: bool,
    stop_after: int | None,
    steps: int,
    tell: Callable[[Callable[[], Path | None]], Path | None] = lambda find: find(),
) -> Checkpoint | None:
    """The checkpoint that --resume names, None where the run begins. Refuses flags that make no sense together.

    `tell` finds it, and tells the other ranks, which verify it with this one.

    Raises ValueError for these and for a changed configuration (listing the differences, unless `force`), be it that
    of the folder or that of the run whose checkpoint this is; CheckpointError for one that is not there or damaged.
    """
    if force and resume is None:
        raise ValueError(
            "--force only lets --resume go on with a changed configuration, and never overwrites a run; "
            "add --resume auto, or choose another output_dir"
        )
    root = config.output_dir / "checkpoints"
    path = tell(lambda: checkpoint.find(root, resume) if resume is not None else None)
    saved = checkpoint.load(path, together=True) if path else None
    place = "curriculum" if isinstance(config, TrainConfig) else "prompts"
    if saved and place not in saved.state:
        raise ValueError(f"{path} was saved by another command of quartet; resume with that one")
    if resume is not None and not force:
        runs = [config.output_dir.absolute(), *([run_of(path).absolute()] if path else ())]
        for run in dict.fromkeys(runs):
            if (run / "config.yaml").exists():
                refuse_changed_config(run / "config.yaml", config)
    start = saved.step if saved else 0
    if stop_after is not None and stop_after <= start < steps:
        raise ValueError(f"--stop_after={stop_after}: the run goes on from step {start}; give a later step")
    if start > steps:
        raise ValueError(f"{path} is of step {start}, the run ends at step {steps}; resume from an earlier one")
    return saved


def refuse_changed_config(saved: Path, config: RunConfig) -> None:
    """A resumed run must be the same run. Raises ValueError listing what differs."""
    # Over `steps`: other steps are another schedule.
    decays = not isinstance(config, LearningConfig) or config.learner.schedule != "constant"
    free = tuple(key for key in FREE_TO_CHANGE if not (decays and key == "steps"))
    gone: list[str] = []
    before = load(type(config), saved, {"output_dir": config.output_dir}, on_removed=gone.append)
    if isinstance(before, TrainConfig):
        free += tuple(_never_read(before))
    changed = [
        f"  {key}: {then!r} then, {now!r} now"
        for key, (then, now) in differences(*(parse_yaml(dump_yaml(each)) for each in (before, config))).items()
        if not key.startswith(free)
    ]
    changed += [f"  {text}" for text in gone if text.startswith(LEARNED)]
    if isinstance(config, TrainConfig) and config.agent and _kept_thoughts(saved):
        changed.append("  data.thoughts: 'keep' then; now an agent learns each turn as its chat template shows it")
    if changed:
        raise ValueError(
            f"{saved.parent} was started with another configuration:\n"
            + "\n".join(changed)
            + "\nresume it as it was, or use --force to go on with the new one"
        )


def _never_read(before: TrainConfig) -> Iterator[str]:
    """Options that version 0.2 accepted beside others that leave them unread; to drop them changes nothing."""
    loss = before.loss
    if loss.advantage != "group_relative":
        yield "loss.scale_rewards"
    if loss.loss_type == "reinforce" and not loss.beta:
        yield "loss.importance_sampling_level"
    if loss.advantage not in ("gae", "rank_softmax"):
        yield "value.lam"
    if loss.advantage != "distill":
        yield "distill.top_k"


def _kept_thoughts(saved: Path) -> bool:
    """Whether a run of 0.2 had `thoughts: keep`: it learned turns as sampled, however a template rewrites them."""
    options, _ = read_yaml(saved)
    return any(source.get("thoughts") == "keep" for source in sources_of(options))


class BaseWeights:
    """The weights under the adapters of a LoRA run, as a part of its checkpoints: their digest.

    Adapters mean something on their own base weights alone. `trained` are the names of the weights that a checkpoint
    holds, `source` is the option or folder that the others came from, `step` the step that the run goes on from.
    """

    def __init__(
        self, policy: Policy, trained: Collection[str], source: str, step: int, on_change: Callable[[str], None]
    ) -> None:
        self.source, self.step, self.on_change = source, step, on_change
        self.checksum = base_checksum(policy, trained)

    def state_dict(self) -> str:
        return self.checksum

    def load_state_dict(self, then: str) -> None:
        """Calls `on_change` with the reason where the adapters of a checkpoint belong on other weights."""
        if then != self.checksum:
            self.on_change(_other_base(self.source, self.step, then, self.checksum))


def base_checksum(policy: Policy, names: Collection[str]) -> str:
    """A digest of the weights that a checkpoint does not hold; `kept` are the names that it does hold.

    For a LoRA run these are the base weights. Bits and names count, and how many files they came from does not.
    """
    from policies import four_bit  # with transformers, which readers of a run's records do not need
    from policies.policy import checksum

    has_head = any(name.startswith("mtp.") for name in names)  # where it has none, one was added since
    weights = {
        n.replace(".base_layer", ""): weight
        for n, weight in policy.named_parameters()
        if n not in names and (has_head or not n.startswith("mtp."))
    }
    return checksum({n + end: part for n, weight in weights.items() for end, part in four_bit.parts(weight).items()})


def base_changed(policy: Policy, saved: Checkpoint, source: str) -> str | None:
    """Says why these adapters do not belong on this policy, and the way out; None where they do.

    `source` is the option or folder that the base came from. A checkpoint of full updates holds every weight and
    has no digest, so it is not checked.
    """
    then = saved.state.get("base")
    now = base_checksum(policy, saved.tensors["policy"]) if then else None
    return None if then is None or now is None or then == now else _other_base(source, saved.step, then, now)


def _other_base(source: str, step: int, then: str, now: str) -> str:
    return (
        f"{source}: the base weights are not those that the adapters of step {step} were trained on (digest "
        f"{then} then, {now} now); put back the files that the run began with, or start a new run in another output_dir"
    )

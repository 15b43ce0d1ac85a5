"""How every training begins: its plan is checked, its processes join, its task and its folder are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from grpo.config.mtp import MtpConfig
from grpo.config.run import LearningConfig, TrainConfig
from grpo.learner.build import grpo_learner
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS, joined
from grpo.run.resume import BaseWeights
from grpo.source.policy_source import holds_head, load_beside, load_policy, with_threads
from grpo.steps.callback import callbacks_of
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.pool import sampling_of, sampling_of_steps
from grpo.task.check import check_plan, open_task
from grpo.task.parts import check_lengths
from grpo.task.task import Task
from policies import four_bit
from policies.devices import device_of
from policies.paths import Paths
from policies.policy import Policy, PolicyError
from rewards.config.problems import python_words

if TYPE_CHECKING:
    from grpo.learner.batch import TrainingBatch
    from grpo.learner.row import PackedRow
    from grpo.steps.ahead import Batches
    from rollout.sampling import SamplingParams

Config = TypeVar("Config", bound=LearningConfig | MtpConfig)


class Periodic(Protocol):
    every: int | None


class LearningSession(Protocol):
    """What is read and set here of a `grpo.session.Session`, whose module imports this one."""

    run: Run[Any]
    policy: Policy
    learner: Learner
    collector: Collector
    batches: Batches
    plain: Policy | None
    sync_check: SamplingParams | None

    @property
    def held_out(self) -> Periodic: ...
    def solutions(self, count: int, /) -> list[PackedRow]: ...
    def prepare_solutions(self, rows: Sequence[PackedRow], /) -> TrainingBatch: ...
    def learn(self, batch: TrainingBatch, /) -> dict[str, float]: ...
    def record(self, step: int, metrics: dict[str, float], /) -> None: ...
    def save_if_due(self, step: int, /) -> None: ...


Session = TypeVar("Session", bound=LearningSession)


@contextmanager
def open_run(
    config: Config,
    last: int,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    ready: Callable[[Task], object] = lambda task: None,
) -> Iterator[tuple[Run[Config], Task]]:
    """The run of `last` steps in its folder, and what it is about. Everything that can be refused is refused before the
    folder is touched, also what `ready` raises when it sees the task."""
    with ExitStack() as stack:
        stack.enter_context(python_words())
        config = with_threads(config, resume, check_plan(config).shape)
        ranks = ONE_PROCESS
        if isinstance(config, LearningConfig):
            ranks = stack.enter_context(joined(device_of(config.device).type == "cpu", config.learner.parallel))
        task = stack.enter_context(open_task(config, scores=ranks.first))
        ready(task)
        flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force, "sources": task.sources}
        run = stack.enter_context(Run.open(config, last, task.describe_rewards(), ranks=ranks, **flags))
        task.record_split(run.log)
        yield run, task


def first_policy(run: Run[Any], task: Task, model: str | None = None) -> Policy:
    """The policy that a run begins with, or another one that `model` means; where it will sample, every prompt has room
    for its completion."""
    config = run.config if model is None else run.config.model_copy(update={"model": model})
    head = run.saved is not None and holds_head(run.saved)
    policy = load_policy(config, task.corpus(), run.ranks, head=head)
    if packing := getattr(policy.trunk, "hf_quantizer", None):
        from policies.files.packed import stays_packed

        raise PolicyError(stays_packed(config.model, packing.quantization_config.quant_method))
    if policy.paths != Paths():
        run.log.say(f"a model of type {policy.config.model_type!r} is {policy.paths.with_reasons}")
    supervised_before = run.resumes or run.saved is not None or model is not None
    check_lengths(task, policy, config, begins=not supervised_before)
    return policy


def shared_policy(run: Run[TrainConfig], plain: Policy | None, of: Run[TrainConfig]) -> Policy:
    """The policy that another run `of` began with, whose frozen weights both use. Raises ValueError where they are not
    frozen."""
    one, other = run.config, of.config
    if plain is None or one.lora is None:
        raise ValueError(
            "base=: sessions share weights that none of them moves or shards; set lora in both configurations, and "
            "learn in one process"
        )
    pairs = {"model": (one.model, other.model), "dtype": (one.dtype, other.dtype), "device": (one.device, other.device)}
    for name, (here, there) in pairs.items():
        if here != there:
            raise ValueError(f"base=: {name}={here!r}, and the other session has {name}={there!r}; make them the same")
    return plain.sharing(head=False)


def grpo_session(
    session_of: Callable[..., Session], run: Run[TrainConfig], task: Task, base: LearningSession | None = None
) -> Session:
    """A session of `grpo.session` that learns by GRPO; after an SFT stage it begins with the policy of that. `base` is
    another session, whose frozen weights it shares."""
    config, ranks = run.config, run.ranks
    start = str(run.folder / "warm_start") if config.sft.steps else None
    again, beside = partial(first_policy, run, task, start), partial(load_beside, config)
    policy = again() if base is None else shared_policy(run, base.plain, base.run)
    counts = four_bit.counts(policy.trunk)
    if counts["in_4_bits"]:
        run.log.event("base_in_4_bits", **counts)
    plain = policy.sharing(head=True) if config.lora and ranks.layout is None else None
    learner = grpo_learner(policy, config, task.reward_weights, ranks, again, beside)
    stream = task.stream(config.seed)
    collector = Collector(run, task, policy, sampling_of_steps(run, task, policy), stream, callbacks_of(run, task))
    session = session_of(run, task, learner, collector, plain)
    session.held_out.every, session.sync_check = config.eval.every, sampling_of(run, policy, 1)
    run.restore(learner=learner, curriculum=session.batches, **base_weights(run, learner))
    return session


def base_weights(run: Run[TrainConfig], learner: Learner) -> dict[str, BaseWeights]:
    """Lets checkpoints of LoRA keep the digest of the weights under the adapters."""
    if not run.config.lora:
        return {}
    warm = f"SFT stage {run.folder / 'warm_start'}"
    source = warm if run.config.sft.steps else f"model={run.config.model!r}"

    def on_change(changed: str) -> None:
        if not run.forced:
            raise ValueError(f"{changed}, or use --force to go on with the new ones")
        run.log.event("base_changed", step=run.start, what=changed)

    return {"base": BaseWeights(learner.policy, learner.state()[0]["policy"], source, run.start, on_change)}

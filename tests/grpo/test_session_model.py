"""The primitives of a session in any order, next to a naive model of what they mean.

The model (`Naive`) is plain torch. It reads one sequence at a time without packing, has each loss as its formula, and
updates with `torch.optim.AdamW`. What the first forward of a batch settles is in a dictionary by batch and loss, so
nothing that is called in between can matter. After every call the weights of the session are compared with those of
the model bit by bit. An update may differ by rounding only.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from grpo import Session
from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.loss import LossOptions
from grpo.run.stop import Stopped
from grpo.steps.callback import Callback
from policies.routing.routers import RoutingRecorder
from rewards.group_score import GroupScore
from rollout.workers.local_pool import LocalPool

STEPS, WARMUP, BIAS_RATE = 8, 2, 0.05
EPSILON_OF_STD = 1e-4  # of group-relative advantages, as in TRL
MOST_WEIGHT = 3.0  # of the importance correction
CLOSE = 0.02  # how far an update may be from the model's, as a share of its size: AdamW turns rounding into ±rate
OPTIONS = {
    "sft.steps": 0,
    "steps": STEPS,
    "prompts_per_step": 2,
    "data.limit": 7,
    "eval.limit": 2,
    "rollout.group_size": 3,
    "rollout.max_completion_tokens": 6,
    "rollout.draft_tokens": 0,
    "rollout.temperature": 0.8,
    "loss.loss_type": "grpo",
    "loss.epsilon": 0.1,
    "loss.importance_correction": "sequence_truncate",
    "learner.schedule": "linear",
    "learner.warmup_steps": WARMUP,
    "mtp.loss_weight": 0.0,
    "balance.bias_rate": BIAS_RATE,
    "checkpoint.every": 100,
    "checkpoint.keep_best": True,
    "eval.every": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"loss.beta": 0.1},
    "adapters": {"lora": {"rank": 2}, "loss.beta": 0.1},
    "ahead": {"rollout.staleness": 1},
}


# ---- checks that have names ------------------------------------------------------------------------------------------


def check(name: str, holds: bool, *seen: object) -> None:
    assert holds, f"{name}: {', '.join(map(str, seen))}"


def check_refused(name: str, act: Callable[[], object], words: str) -> None:
    refusal = None
    try:
        act()
    except ValueError as error:
        refusal = error
    check(name, refusal is not None and bool(re.search(words, str(refusal))), repr(refusal), words)


# ---- losses ----------------------------------------------------------------------------------------------------------


def per_token(logprobs, sampling_logprobs, advantages, mask):
    return -(advantages + 0.3) * logprobs


def of_all(logprobs):
    return torch.stack([one.mean() for one in logprobs]).square().mean()


LOSSES: dict[str, Callable[[], Any]] = {
    "configured": lambda: None,
    "dapo": lambda: "dapo",
    "reinforce": lambda: "reinforce",
    "options": lambda: LossOptions(loss_type="dapo", epsilon=0.05, importance_correction="token_mask"),
    "top entropy": lambda: LossOptions(top_entropy_quantile=0.5, importance_correction="none"),
    "supervised": lambda: "supervised",
    "per token": lambda: per_token,
    "of all": lambda: of_all,
}
PLACE = st.integers(0, 2)  # of a loss among those of a sequence
SCORES = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, None])


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Sequence1:
    """One completion, with all that a loss reads of it."""

    prompt: list[int]
    completion: list[int]
    sampling: Tensor
    advantages: Tensor
    tied: bool  # no completion of its group has an advantage
    number: int  # [group, sample] flattened


@dataclass(eq=False)
class Batch:
    """A batch of the session, and what it was made of."""

    made: Any
    sequences: list[Sequence1]
    groups: list[Any] = field(default_factory=list)
    scores: list[GroupScore] | None = None  # None: it is not recorded
    given: Any = None  # advantages
    rows: list[Any] | None = None  # solutions
    opened: int = 0  # the number of the session that has made it
    examples: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(one.completion) for one in self.sequences)


def group_relative(rewards: Sequence[float | None]) -> list[float]:
    """(R - mean) / (std + ε) over the completions that have a reward; 0 for the others and if all are equal."""
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean = sum(known) / len(known)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    return [0.0 if reward is None else (reward - mean) / (std + EPSILON_OF_STD) for reward in rewards]


def sequences_of(groups: Sequence[Any], scores: Sequence[GroupScore] | None, given: Any) -> list[Sequence1]:
    """The completions that have a reward and tokens; without scores all of them."""
    found = []
    for g, group in enumerate(groups):
        rewards = [0.0] * len(group.completions) if scores is None else scores[g].rewards
        advantages = group_relative(rewards) if given is None else given[g]
        counted = [i for i, c in enumerate(group.completions) if rewards[i] is not None and c.token_ids]
        tensors = {}
        for i in counted:
            length = len(group.completions[i].token_ids)
            tensors[i] = torch.tensor(advantages[i], dtype=torch.float32).expand(length)
        tied = not any(tensor.any() for tensor in tensors.values())
        for i in counted:
            c = group.completions[i]
            number = g * len(group.completions) + i
            sampling = torch.tensor(c.logprobs)
            found.append(Sequence1(group.prompt.token_ids, c.token_ids, sampling, tensors[i], tied, number))
    return found


def sequences_of_rows(rows: Sequence[Any]) -> list[Sequence1]:
    found = []
    for number, row in enumerate(rows):
        ids = row.samples[0].token_ids
        found.append(Sequence1(row.prompt_token_ids, ids, torch.zeros(len(ids)), torch.zeros(len(ids)), True, number))
    return found


class Naive:
    """The policy, its updates, and what was settled by the first forward of each batch for each loss."""

    def __init__(self, session: Session) -> None:
        self.config = session.config
        self.trunk = copy.deepcopy(session.policy.trunk)
        self.reference = copy.deepcopy(self.trunk)
        trained = [p for p in self.trunk.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() == 1]
        groups = [{"params": part, "weight_decay": 0.0} for part in (matrices, others) if part]
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(self.config.learner.betas))
        self.waits = False
        self.settled: dict[tuple[int, str], dict[str, Any]] = {}
        self.kept: list[Batch] = []  # no id of a batch is used again
        self.chosen = self.no_choices()  # of experts, in the step

    # ---- weights -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        weights = {name: tensor.clone() for name, tensor in self.trunk.state_dict().items()}
        return {"weights": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def load(self, state: dict[str, Any]) -> None:
        self.trunk.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad()
        self.waits = False

    def take_over(self, session: Session) -> None:
        """The session's weights exactly, so that no rounding adds up."""
        self.trunk.load_state_dict(session.policy.trunk.state_dict())

    def other_than(self, session: Session) -> list[str]:
        """The names of weights that are not those of the session, bit for bit."""
        theirs = session.policy.trunk.state_dict()
        return [name for name, tensor in self.trunk.state_dict().items() if not torch.equal(tensor, theirs[name])]

    # ---- forward -----------------------------------------------------------------------------------------------------

    def logits(self, trunk: Any, one: Sequence1) -> Tensor:
        """The logits that predict each token of the completion."""
        ids = torch.tensor([one.prompt + one.completion])
        return trunk(input_ids=ids).logits[0, len(one.prompt) - 1 : -1].float()

    def logprobs(self, one: Sequence1, temperature: float, trunk: Any = None) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each token of the completion."""
        logs = (self.logits(trunk or self.trunk, one) / temperature).log_softmax(-1)
        chosen = logs.gather(1, torch.tensor(one.completion)[:, None])[:, 0]
        return chosen, -(logs.exp() * logs).sum(-1).detach()

    # ---- experts -----------------------------------------------------------------------------------------------------

    def no_choices(self) -> list[Tensor]:
        with RoutingRecorder(self.trunk) as routing, torch.no_grad():
            self.trunk(input_ids=torch.tensor([[1, 2]]))
        return [torch.zeros(logits.shape[-1]) for logits in routing.logits]

    def note_choices(self, routing: RoutingRecorder, one: Sequence1) -> None:
        for layer, experts in enumerate(routing.experts):
            for expert in experts[len(one.prompt) :].flatten().tolist():
                self.chosen[layer][expert] += 1

    def move_biases(self) -> None:
        """Experts that were chosen less often than the mean become easier to choose."""
        biases = [tensor for name, tensor in self.trunk.state_dict().items() if name.endswith("correction_bias")]
        for bias, chosen in zip(biases, self.chosen, strict=True):
            bias += BIAS_RATE * torch.sign(chosen.mean() - chosen)

    # ---- learning ----------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, name: str) -> dict[str, float]:
        """Adds the gradient of a loss to what waits; returns the loss as the metric that the session has of it."""
        loss = LOSSES[name]()
        options = self.options_of(loss)
        teaches = options is None or options.beta > 0 or any(one.advantages.any() for one in batch.sequences)
        if not batch.sequences or not teaches:
            return {}
        reads_tied = options is None or options.beta > 0 or options.top_entropy_quantile < 1
        read = [one for one in batch.sequences if reads_tied or not one.tied]
        temperature = 1.0 if loss == "supervised" else self.config.rollout.temperature
        policy, entropies = [], []
        for one in read:
            with RoutingRecorder(self.trunk) as routing:
                logprobs, entropy = self.logprobs(one, temperature)
            self.note_choices(routing, one)
            policy.append(logprobs)
            entropies.append(entropy)
        self.kept.append(batch)
        first = {"old": [logprobs.detach() for logprobs in policy], "read": [one.number for one in read]}
        if options is not None and options.top_entropy_quantile < 1:
            first["threshold"] = torch.cat(entropies).quantile(1 - options.top_entropy_quantile)
        settled = self.settled.setdefault((id(batch), name), first)
        if loss == "supervised":
            total = -sum(logprobs.sum() for logprobs in policy) / batch.tokens
            metrics = {"loss/sft": total.item()}
        elif loss is of_all:
            total = of_all(policy)
            metrics = {"loss/custom": total.item()}
        elif loss is per_token:
            summed = sum(per_token(p, None, one.advantages, None).sum() for p, one in zip(policy, read, strict=True))
            total = summed / batch.tokens
            metrics = {"loss/custom": total.item()}
        else:
            total, metrics = self.policy_loss(options, batch, read, policy, entropies, settled)
        total.backward()
        self.waits = True
        return metrics

    def options_of(self, loss: Any) -> LossOptions | None:
        """The options of a policy loss; None for other losses. A name changes the type of the configured loss only."""
        if loss is None:
            return self.config.loss
        if isinstance(loss, LossOptions):
            return loss
        if isinstance(loss, str) and loss != "supervised":
            return self.config.loss.model_copy(update={"loss_type": loss})
        return None

    def policy_loss(
        self,
        options: LossOptions,
        batch: Batch,
        read: list[Sequence1],
        policy: list[Tensor],
        entropies: list[Tensor],
        settled: dict[str, Any],
    ) -> tuple[Tensor, dict[str, float]]:
        objective_sum, kl_sum = torch.zeros(()), torch.zeros(())
        for place, (one, now, old) in enumerate(zip(read, policy, settled["old"], strict=True)):
            ratio = (now - old).exp()
            objective = self.objective(options, ratio, now, one.advantages) * self.weight(options, old - one.sampling)
            if "threshold" in settled:
                objective = objective * (entropies[place] >= settled["threshold"])
            share = 1 / batch.tokens
            if options.loss_type == "grpo":
                share = 1 / len(batch.sequences) / len(one.completion)
            objective_sum = objective_sum + share * objective.sum()
            if options.beta:
                with torch.no_grad():
                    reference, _ = self.logprobs(one, self.config.rollout.temperature, self.reference)
                d = reference - now
                kl_sum = kl_sum + share * (ratio * (d.exp() - 1 - d)).sum()
        return -objective_sum + options.beta * kl_sum, {"loss/policy": -objective_sum.item()}

    def objective(self, options: LossOptions, ratio: Tensor, now: Tensor, advantages: Tensor) -> Tensor:
        if options.loss_type == "reinforce":
            return advantages * now
        clipped = ratio.clamp(1 - options.epsilon, 1 + options.epsilon)
        return torch.minimum(ratio * advantages, clipped * advantages)

    def weight(self, options: LossOptions, log_ratio: Tensor) -> Tensor:
        """π_old / μ as the options correct by it."""
        match options.importance_correction:
            case "none":
                return torch.ones(())
            case "token_mask":
                ratio = log_ratio.exp()
                return ratio.where(ratio <= MOST_WEIGHT, 0.0)
            case "sequence_truncate":
                return log_ratio.sum().exp().clamp(max=MOST_WEIGHT)
        raise NotImplementedError(options.importance_correction)

    def optim_step(self, step: int, learning_rate: float | None, weight_decay: float | None) -> dict[str, float]:
        """Clips and makes one step of AdamW, at the rate of the step in progress."""
        if not self.waits:
            return {}
        if learning_rate is None:
            done = max(0, step - 1 - WARMUP) / (STEPS - WARMUP)
            learning_rate = self.config.learner.learning_rate * (step / WARMUP if step <= WARMUP else 1 - done)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.learner.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            if weight_decay is not None and group["params"][0].dim() > 1:
                group["weight_decay"] = weight_decay
        self.optimizer.step()
        self.drop()
        return {"learner/grad_norm": norm.item(), "learner/learning_rate": learning_rate}


# ---- what the folder of a run holds ----------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of steps, without those of evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/prompts" not in line]


def rollouts_of(folder: Path, step: int) -> list[dict[str, Any]]:
    path = folder / f"rollouts/step_{step:06d}.jsonl.zst"
    if not path.exists():
        return []
    return [json.loads(line) for line in zstandard.ZstdDecompressor().decompress(path.read_bytes()).splitlines()]


def close_to(one: float, other: float, relative: float = 1e-3) -> bool:
    return abs(one - other) <= relative * abs(other) + 1e-5


def once(name: str) -> Callable[[Any], Any]:
    """A rule that is called once between two updates, since it would do the same again."""

    def decorate(act: Callable[..., Any]) -> Any:
        @functools.wraps(act)
        def noted(self: Primitives, *given: Any, **chosen: Any) -> Any:
            self.done.add(name)
            return act(self, *given, **chosen)

        return precondition(lambda self: name not in self.done)(noted)

    return decorate


class Hears(Callback):
    """Notes the steps of evaluations that callbacks of the run hear of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_evaluate(self, step: int, results: Any) -> None:
        self.steps.append(step)


# ---- the machine -----------------------------------------------------------------------------------------------------


class Primitives(RuleBasedStateMachine):
    """A loop of one's own that does what it likes."""

    groups, batches = Bundle("groups"), Bundle("batches")

    def __init__(self, micro_config: Callable[..., Any], folder: Path) -> None:
        super().__init__()
        self.micro_config, self.folder = micro_config, folder
        self.opened = self.names = 0
        self.context: Any = None

    # ---- opening and leaving -----------------------------------------------------------------------------------------

    @initialize(
        target=batches,
        kind=st.sampled_from(list(KINDS)),
        losses=st.lists(st.sampled_from(list(LOSSES)), min_size=3, max_size=3),
    )
    def open(self, kind: str, losses: list[str]) -> Any:
        self.kind = kind
        self.losses = losses  # few of them, so that one comes again
        self.config = self.micro_config(self.folder / "run", **OPTIONS | KINDS[kind])
        self.whole = 0  # the last whole step
        self.recorded: list[int] = []  # steps that have their line
        self.taken: list[int] = []  # how many problems were taken from the data at a time
        self.learned: dict[str, Any] = {}  # problems that were learned from, by id
        self.checkpoints: list[tuple[Path, dict[str, Any], list[int]]] = []  # with what the model was then
        self.enter(None)
        self.naive = Naive(self.session)
        self.begin()
        self.save()
        return self.draw() if kind == "ahead" else self.sample_and_prepare([1.0, 0.0, 0.5])

    def enter(self, resume: str | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.kind == "ahead":  # a copy of the policy in this process samples, as a Ray worker would
                patch.setattr("grpo.steps.pool.open_pool", lambda policy, given: LocalPool(policy.merged(), given))
            self.context = Session.open(self.config, resume=resume)
            self.session = self.context.__enter__()
        self.is_synced = True
        self.seen: dict[str, Any] = {}  # and those that were evaluated in this session, besides the held-out ones
        self.opened += 1
        self.steps = self.session.run.steps()

    def begin(self) -> None:
        """The next step."""
        self.begin_step(next(self.steps))

    def begin_step(self, step: int) -> None:
        self.step = step
        check("number of the step", self.step == self.whole + 1, self.step, self.whole)
        self.taken_before = list(self.taken)
        self.done: set[str] = set()  # see `once`
        self.naive.chosen = [torch.zeros_like(chosen) for chosen in self.naive.chosen]
        self.moved = self.handed_on = self.is_recorded = self.is_drawn = self.is_reached = False
        self.is_read_twice = False  # a batch, by one loss in one update
        self.is_loose = False  # it is not said what the record of the step holds
        self.sampled_tokens = 0
        self.worked: list[tuple[Batch, str]] = []  # batches and losses, in the order of their first forward in the step
        self.waiting: list[tuple[Batch, str]] = []
        self.used: list[tuple[Batch, str]] = []  # those of which an update was made

    def leave(self, how: str) -> None:
        if how in ("break", "finish"):
            self.steps.close()
            if how == "finish":
                self.finish()
            self.context.__exit__(None, None, None)
        else:
            error = Stopped() if how == "stop" else OSError("the disk is full")
            assert not self.context.__exit__(type(error), error, None)
        self.context = None

    def finish(self) -> None:
        """The policy at the end is the one that the loop has learned, whichever was the best."""
        result = self.session.finish()
        if self.moved:
            self.hand_on()
        check("policy of the result", result.policy is self.session.policy)
        names = self.naive.other_than(self.session)
        check("weights of the result", not names, *names[:3])

    def teardown(self) -> None:
        if self.context is not None:
            self.leave("break")
        shutil.rmtree(self.folder, ignore_errors=True)

    def end_early(self) -> bool:
        """A step that was cut short is whole from its first `optim_step` or its line on; else it is undone."""
        is_whole = self.is_reached or self.is_recorded
        if is_whole:
            self.hand_on()
            self.whole = int(self.step)
            self.recorded += [] if self.is_recorded else [self.whole]
        else:
            self.taken = self.taken_before
        self.naive.drop()
        return is_whole

    @precondition(lambda self: self.step < STEPS - 1)
    @rule(how=st.sampled_from(["break", "stop", "failure", "finish"]))
    def leave_and_resume(self, how: str) -> None:
        self.leave(how)
        is_whole = self.end_early()
        steps = [line["step"] for line in lines_of(self.config.output_dir)]
        check("lines of a run that was left", steps == self.recorded, steps, self.recorded)
        if is_whole:
            self.look_at_record(int(self.step))
        self.enter("auto")
        check("step that is resumed", self.session.step == self.whole, self.session.step, self.whole)
        names = self.naive.other_than(self.session)
        check("weights that are resumed", not names, *names[:3])
        self.begin()

    @precondition(lambda self: self.step < STEPS - 1)
    @rule()
    def other_loop(self) -> None:
        """A second loop over the steps goes on after the last whole one."""
        self.steps.close()
        self.steps = self.session.run.steps()
        step = next(self.steps)  # which ends the one that was left
        self.end_early()
        self.begin_step(step)

    @precondition(lambda self: self.kind == "adapters")
    @rule()
    def learn_in_another_session(self) -> None:
        """It has the same frozen weights, and adapters of its own."""
        self.names += 1
        config = self.micro_config(self.folder / f"other_{self.names}", **OPTIONS | KINDS[self.kind])
        with Session.open(config, base=self.session) as other:
            for step in other.run.steps():
                groups = other.sample(other.prompts(step), step=step)
                before = [weight.clone() for weight in other.policy.trunk.parameters()]
                other.forward_backward(other.prepare(groups), per_token)
                other.optim_step(0.01)
                pairs = zip(before, other.policy.trunk.parameters(), strict=True)
                check("the other session learns", any(not torch.equal(old, new) for old, new in pairs))
                break

    # ---- what every call leaves as it is -----------------------------------------------------------------------------

    @invariant()
    def weights_are_those_of_the_model(self) -> None:
        if self.context is not None:
            names = self.naive.other_than(self.session)
            check("weights", not names, *names[:3])
            check("step.moved", self.is_loose or self.step.moved == self.moved, self.step.moved, self.moved)

    def hand_on(self) -> None:
        """The biases move once a step. After calls in an order that is not foreseen the session's are taken."""
        if not self.moved:
            return
        if self.handed_on or self.is_loose or self.waiting or self.is_read_twice:
            self.take_biases()
        else:
            self.naive.move_biases()
        self.handed_on = True

    def take_biases(self) -> None:
        theirs = self.session.policy.trunk.state_dict()
        for name, tensor in self.naive.trunk.state_dict().items():
            if name.endswith("correction_bias"):
                tensor.copy_(theirs[name])

    # ---- what is learned from ----------------------------------------------------------------------------------------

    def problems(self, count: int) -> list[str]:
        """The ids of the next problems, by replaying what was taken before."""
        stream = self.session.task.stream(self.config.seed)
        for number in self.taken:
            stream.take_examples(number)
        self.taken.append(count)
        return [example.example_id for example in stream.take_examples(count)]

    @precondition(lambda self: not self.is_recorded and self.kind != "ahead")
    @rule(target=groups, count=st.integers(1, 2), size=st.sampled_from([2, 3]))
    def sample(self, count: int, size: int) -> Any:
        return self.sample_groups(count, size)

    def sample_groups(self, count: int, size: int) -> list[Any]:
        self.sync_before_sampling()
        prompts = self.session.prompts(self.step, count)
        expected = self.problems(count)
        check("order of the data", [p.prompt_id for p in prompts] == expected, prompts, expected)
        found = self.session.sample(prompts, step=self.step, group_size=size)
        self.note_sampled(found)
        return found

    def note_sampled(self, groups: Sequence[Any]) -> None:
        self.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.completions)

    def prepare(self, groups: Sequence[Any], scores: list[GroupScore] | None, given: Any) -> Batch:
        made = self.session.prepare(groups, scores, given)
        sequences = sequences_of(groups, scores, given)
        return Batch(made, sequences, list(groups), scores, given, opened=self.opened)

    def scores_of(self, groups: Sequence[Any], data: st.DataObject) -> list[GroupScore]:
        scores = []
        for group in groups:
            size = len(group.completions)
            scores.append(GroupScore(data.draw(st.lists(SCORES, min_size=size, max_size=size), "rewards"), {}))
        return scores

    @precondition(lambda self: not self.is_recorded and self.kind != "ahead")
    @rule(target=batches, rewards=st.lists(SCORES, min_size=3, max_size=3))
    def sample_and_prepare(self, rewards: list[float | None]) -> Batch:
        groups = self.sample_groups(2, 3)
        return self.prepare(groups, [GroupScore(list(rewards), {}) for _ in groups], None)

    @precondition(lambda self: not (self.is_recorded or self.is_drawn))
    @rule(target=batches)
    def draw(self) -> Batch:
        """The batch of the step as the run itself draws it, perhaps ahead."""
        self.sync_before_sampling()
        drawn = self.session.draw(self.step)
        self.is_drawn = True
        ids, expected = [group.prompt.prompt_id for group in drawn.groups], self.problems(2)
        check("order of what is drawn", ids == expected, ids, expected)
        self.note_sampled(drawn.groups)
        made, sequences = self.session.prepare(drawn), sequences_of(drawn.groups, drawn.scores, None)
        return Batch(made, sequences, drawn.groups, drawn.scores, opened=self.opened)

    def draw_what_is_ahead(self) -> None:
        """A step that learns draws its batch, so that none which was sampled ahead is passed over."""
        if self.kind == "ahead" and not self.is_drawn:
            self.draw()

    @rule(target=batches, groups=groups, data=st.data())
    def prepare_scored(self, groups: Sequence[Any], data: st.DataObject) -> Batch:
        return self.prepare(groups, self.scores_of(groups, data), None)

    @rule(target=batches, groups=groups, scored=st.booleans(), each=st.booleans(), shift=st.integers(0, 5))
    def prepare_given(self, groups: Sequence[Any], scored: bool, each: bool, shift: int) -> Batch:
        """Advantages of one's own, for every completion or for every token."""
        given: list[list[Any]] = []
        for g, group in enumerate(groups):
            given.append([])
            for i, c in enumerate(group.completions):
                value = float((3 * g + i + shift) % 4) - 1
                given[-1].append([value * (t % 2) for t in range(len(c.token_ids))] if each else value)
        scores = [GroupScore([1.0] * len(group.completions), {}) for group in groups] if scored else None
        return self.prepare(groups, scores, given)

    @rule(target=batches, groups=groups, empty=st.integers(0, 1))
    def prepare_one_without_tokens(self, groups: Sequence[Any], empty: int) -> Batch:
        """A completion without tokens has advantages without values."""
        first, *rest = groups
        completions = list(first.completions)
        completions[empty] = replace(completions[empty], token_ids=[], logprobs=[], text="")
        changed = [replace(first, completions=completions), *rest]
        given = []
        for group in changed:
            given.append([[float(t + i) for t in range(len(c.token_ids))] for i, c in enumerate(group.completions)])
        return self.prepare(changed, None, given)

    @rule(target=batches)
    def prepare_nothing(self) -> Any:
        """An empty batch, from which nothing is learned."""
        return self.prepare([], None, None)

    @precondition(lambda self: not self.is_recorded and self.kind != "ahead")
    @rule(target=batches, count=st.integers(1, 2))
    @once("solutions")
    def solutions(self, count: int) -> Batch:
        rows = self.session.solutions(count)
        expected = self.problems(count)
        texts = [self.session.policy.tokenizer.decode(row.prompt_token_ids) for row in rows]
        by_id = {example.example_id: example for example in self.session.task.train}
        prompts = [self.session.task.prompt(by_id[name], self.session.policy.tokenizer) for name in expected]
        ids = [row.prompt_token_ids for row in rows]
        check("order of the solutions", ids == [prompt.token_ids for prompt in prompts], texts, expected)
        made = self.session.prepare_solutions(rows)
        return Batch(made, sequences_of_rows(rows), rows=rows, opened=self.opened)

    # ---- what cannot be learned from ---------------------------------------------------------------------------------

    @rule(groups=groups, fault=st.sampled_from(["groups", "completions", "scores", "tokens", "first tokens", "sizes"]))
    @once("refuse_shapes")
    def refuse_shapes(self, groups: list[Any], fault: str) -> None:
        scores = [GroupScore([1.0] * len(group.completions), {}) for group in groups]
        given = [[[1.0] * len(c.token_ids) for c in group.completions] for group in groups]
        words = "group"
        if fault == "groups":
            given = [*given, given[-1]]
        elif fault == "completions":
            given = [*given[:-1], given[-1][:-1]]
        elif fault == "scores":
            scores = [*scores[:-1], GroupScore(scores[-1].rewards[:-1], {})]
        elif fault == "tokens":
            given[-1][-1] = [1.0, *given[-1][-1]]
        elif fault == "first tokens":
            given[0][0] = []
        elif len(groups[0].completions) > 2 or len(groups) > 1:
            shorter = replace(groups[0], completions=groups[0].completions[:-1])
            groups, scores = [shorter, groups[0]], [GroupScore([1.0] * len(shorter.completions), {}), scores[0]]
            given = None
        else:
            return
        check_refused(f"shapes: {fault}", lambda: self.session.prepare(groups, scores, given), words)

    @rule(groups=groups, fault=st.sampled_from(["reward", "advantage", "advantage of a token", "logprob"]))
    @once("refuse_not_finite")
    def refuse_not_finite(self, groups: list[Any], fault: str) -> None:
        scores = [GroupScore([1.0] * len(group.completions), {}) for group in groups]
        given: Any = None
        if fault == "reward":
            scores[-1].rewards[1] = math.nan
        elif fault == "advantage":
            given = [[1.0] * len(group.completions) for group in groups]
            given[-1][1] = math.nan
        elif fault == "advantage of a token":
            given = [[[1.0] * len(c.token_ids) for c in group.completions] for group in groups]
            given[-1][1][0] = math.inf
        else:
            last = groups[-1]
            bad = replace(last.completions[1], logprobs=[math.nan] * len(last.completions[1].token_ids))
            groups = [*groups[:-1], replace(last, completions=[last.completions[0], bad, *last.completions[2:]])]
        check_refused(f"not finite: {fault}", lambda: self.session.prepare(groups, scores, given), "group")

    @precondition(lambda self: not self.is_recorded and self.kind != "ahead")
    @rule(temperature=st.sampled_from([0.5, 1.0]))
    @once("refuse_temperature")
    def refuse_temperature(self, temperature: float) -> None:
        self.sync_before_sampling()
        prompts = self.session.prompts(self.step, 1)
        self.problems(1)
        groups = self.session.sample(prompts, step=self.step, temperature=temperature, group_size=2)
        self.note_sampled(groups)
        scores = [GroupScore([1.0, 0.0], {})]
        check_refused("another temperature", lambda: self.session.prepare(groups, scores), "temperature")

    @rule(way=st.sampled_from(["groups", "drawn", "solutions"]))
    @once("refuse_held_out")
    def refuse_held_out(self, way: str) -> None:
        session = self.session
        prompt = session.held_out.prompts[0]
        group = session.group(prompt, ["a", "b"])
        score = GroupScore([1.0, 0.0], {})
        if way == "groups":
            check_refused("held out: groups", lambda: session.prepare([group], [score]), "held out")
        elif way == "drawn":
            check_refused("held out: drawn", lambda: session.prepare(Drawn([group], [score], [0])), "held out")
        else:
            tokenizer, stop = session.policy.tokenizer, session.policy.stop_token_ids[0]
            row = session.task.solution(session.task.held_out[0], tokenizer, stop)
            check_refused("held out: solutions", lambda: session.prepare_solutions([row]), "held out")

    # ---- learning ----------------------------------------------------------------------------------------------------

    def current(self, batch: Batch) -> Batch:
        """The batch; that of a session which was left is made again."""
        if batch.opened != self.opened:
            again = self.prepare(batch.groups, batch.scores, batch.given) if batch.rows is None else None
            batch.made = self.session.prepare_solutions(batch.rows) if again is None else again.made
            batch.opened = self.opened
            for name in LOSSES:
                self.naive.settled.pop((id(batch), name), None)
        return batch

    def learn(self, batch: Batch, name: str) -> None:
        if batch.rows is not None:
            name = name if name in ("supervised", "of all", "per token") else "supervised"
        self.draw_what_is_ahead()
        batch = self.current(batch)
        if not self.waiting:
            self.naive.drop()
        fresh = (id(batch), name) not in self.naive.settled
        expected = self.naive.forward_backward(batch, name)
        metrics = self.session.forward_backward(batch.made, LOSSES[name]())
        for key, value in expected.items():
            seen = metrics.get(key, math.nan)
            check(f"{name}: {key}", close_to(seen, value), seen, value)
        if not expected:
            self.note_work(batch, name)
            return
        if not fresh and (batch, name) not in self.worked:
            self.is_loose = True  # a batch of an earlier step: what its record holds of this one is not said
        self.note_work(batch, name)
        self.is_read_twice |= (batch, name) in self.waiting  # in one update: how often it counts is not said
        self.waiting.append((batch, name))

    def note_work(self, batch: Batch, name: str) -> None:
        if (batch, name) not in self.worked:
            self.worked.append((batch, name))

    def update(self, rate: float | None, weight_decay: float | None = None) -> None:
        before = self.naive.state()["weights"]
        waits = self.naive.waits
        numbers = {} if weight_decay is None else {"weight_decay": weight_decay}
        expected = self.naive.optim_step(int(self.step), rate, weight_decay)
        metrics = self.session.optim_step(rate, **numbers if waits else {})
        for key, value in expected.items():
            seen = metrics.get(key, math.nan)
            check(key, close_to(seen, value), seen, value)
        self.is_reached = True
        if not waits:
            return
        theirs = self.session.policy.trunk.state_dict()
        for name, tensor in self.naive.trunk.state_dict().items():
            if name.endswith("correction_bias"):
                continue
            size = (tensor - before[name]).norm().item()
            apart = (tensor - theirs[name]).norm().item()
            check("update", apart <= CLOSE * size + 1e-6, name, apart, size)
            tensor.copy_(theirs[name])
        self.moved, self.is_synced = True, False
        self.done.clear()
        self.used += [work for work in self.waiting if work not in self.used]
        self.waiting = []

    @precondition(lambda self: not self.is_recorded)
    @rule(batch=batches, which=PLACE)
    def forward_backward(self, batch: Batch, which: int) -> None:
        self.learn(batch, self.losses[which])

    @precondition(lambda self: not self.is_recorded)
    @rule(rate=st.sampled_from([None, 0.02]), weight_decay=st.sampled_from([None, 0.3]))
    @once("optim_step")
    def optim_step(self, rate: float | None, weight_decay: float | None) -> None:
        self.draw_what_is_ahead()
        self.update(rate, weight_decay)

    @precondition(lambda self: not self.is_recorded)
    @rule(batch=batches, which=PLACE, epochs=st.integers(1, 3))
    def learn_in_epochs(self, batch: Batch, which: int, epochs: int) -> None:
        for _ in range(epochs):
            self.learn(batch, self.losses[which])
            self.update(None)

    @precondition(lambda self: not self.is_recorded)
    @rule(batch=batches, which=st.lists(PLACE, min_size=2, max_size=2), epochs=st.integers(1, 2))
    def learn_from_two_losses(self, batch: Batch, which: list[int], epochs: int) -> None:
        for _ in range(epochs):
            for place in which:
                self.learn(batch, self.losses[place])
            self.update(None)

    @precondition(lambda self: not self.is_recorded)
    @rule(one=batches, other=batches, which=PLACE, epochs=st.integers(1, 2))
    def learn_from_two_batches(self, one: Batch, other: Batch, which: int, epochs: int) -> None:
        for _ in range(epochs):
            self.learn(one, self.losses[which])
            self.learn(other, self.losses[which])
            self.update(None)

    # ---- syncing, evaluating, recording ------------------------------------------------------------------------------

    @rule()
    @once("sync_weights")
    def sync_weights(self) -> None:
        self.session.sync_weights()
        self.is_synced = True
        self.hand_on()

    def sync_before_sampling(self) -> None:
        """Nothing is sampled with weights that the samplers do not hold."""
        if not self.is_synced:
            self.sync_weights()

    @rule()
    @once("evaluate")
    def evaluate(self) -> None:
        self.sync_before_sampling()
        self.session.evaluate()
        self.hand_on()

    @precondition(lambda self: not self.is_recorded)
    @rule(wrong=st.sampled_from([-1, 1, 5]))
    @once("refuse_record_of_another_step")
    def refuse_record_of_another_step(self, wrong: int) -> None:
        other = int(self.step) + wrong
        check_refused("record of another step", lambda: self.session.record(other, {}), f"{int(self.step)}")
        check_refused("save of another step", lambda: self.session.save_if_due(other), f"{int(self.step)}")

    @precondition(lambda self: not self.is_recorded)
    @rule()
    def record(self) -> None:
        """Nothing waits then: what becomes of a gradient of the step before is not said."""
        self.draw_what_is_ahead()
        if self.naive.waits:
            self.update(None)
        self.session.record(self.step, {"loss/custom": 7.0})
        self.hand_on()
        self.is_recorded = True
        self.recorded.append(int(self.step))
        self.look_at_record(int(self.step))

    @precondition(lambda self: self.is_recorded)
    @rule()
    @once("refuse_second_record")
    def refuse_second_record(self) -> None:
        check_refused("second record", lambda: self.session.record(self.step, {}), "line")

    @precondition(lambda self: self.step < STEPS - 1)
    @rule(saves=st.booleans())
    def end_step(self, saves: bool) -> None:
        if not self.is_recorded:
            self.record()
        if saves:
            self.session.save_if_due(self.step)
            self.sync_before_sampling()
            self.session.evaluate_if_due(self.step)
        self.whole = int(self.step)
        self.begin()

    def look_at_record(self, step: int) -> None:
        """The line of the step and its completions."""
        folder = self.config.output_dir
        lines = [line for line in lines_of(folder) if line["step"] == step]
        check("one line for a step", len(lines) == 1, step, lines)
        if self.is_loose:
            return
        line = lines[0]
        if self.sampled_tokens:
            tokens = line.get("completion/tokens")
            check("tokens that were sampled", tokens == self.sampled_tokens, tokens, self.sampled_tokens)
        batches = list(dict.fromkeys(batch for batch, _ in self.worked if batch.scores is not None))
        rewards = [reward for batch in batches for score in batch.scores for reward in score.rewards]
        known = [reward for reward in rewards if reward is not None]
        if len(batches) == 1 and known:
            mean = sum(known) / len(known)
            check("mean reward", close_to(line.get("reward/mean", math.nan), mean), line.get("reward/mean"), mean)
        if not batches and not self.is_drawn and self.kind != "ahead":  # which draws in every step
            check("no reward", "reward/mean" not in line, line.get("reward/mean"))
        self.look_at_rollouts(rollouts_of(folder, step), batches)
        from_groups = [work for work in self.used if work[0].rows is None]
        if from_groups and not self.waiting:
            check("approximate KL", line.get("policy/approx_kl") is not None, line.get("policy/approx_kl"))

    def look_at_rollouts(self, lines: list[dict[str, Any]], batches: list[Batch]) -> None:
        """Every scored batch of the step, one after the other, each with its own log π_old."""
        groups = [group for batch in batches for group in batch.groups]
        ids = [c.token_ids for group in groups for c in group.completions]
        rewards = [reward for batch in batches for score in batch.scores for reward in score.rewards]
        check("completions on record", [line["token_ids"] for line in lines] == ids, len(lines), len(ids))
        check("rewards on record", [line["reward"] for line in lines] == rewards, rewards)
        start = 0
        for batch in batches:
            count = sum(len(group.completions) for group in batch.groups)
            self.look_at_logprobs(lines[start : start + count], batch)
            start += count

    def look_at_logprobs(self, lines: list[dict[str, Any]], batch: Batch) -> None:
        """log π_old by any loss of the batch; it may be missing only where no update was made of it."""
        keys = [(id(batch), name) for other, name in self.worked if other is batch]
        settled = [self.naive.settled[key] for key in keys if key in self.naive.settled]
        for number, line in enumerate(lines):
            known = []
            for each in settled:
                by_number = dict(zip(each["read"], each["old"], strict=True))
                known += [by_number[number].tolist()] if number in by_number else []
            seen = line.get("policy_logprobs")
            if seen is not None:
                is_known = any(seen == pytest.approx(old, abs=1e-3) for old in known)
                check("log-probabilities on record", is_known, number, seen, known)
            elif known and any(b is batch for b, _ in self.used):
                check("log-probabilities on record are missing", False, number, line["token_ids"])

    # ---- problems of one's own ---------------------------------------------------------------------------------------

    def example(self, number: int) -> Any:
        """A problem that is in neither part of the data."""
        like = self.session.task.train[0]
        question = f"What is {number} + {number}?"
        return replace(
            like, example_id=f"own/{number}", question=question, columns={**like.columns, "question": question}
        )

    @rule(number=st.integers(1, 4), again=st.booleans())
    @once("evaluate_problems")
    def evaluate_problems(self, number: int, again: bool) -> None:
        """Answers, and leaves no trace in what the run measures of itself."""
        self.sync_before_sampling()
        session, folder = self.session, self.config.output_dir
        example = session.task.held_out[0] if again else self.example(number)
        if example.example_id in self.learned:
            check_refused("evaluation of what was learned", lambda: session.evaluate([example]), "trained on")
            return
        files = [folder / name for name in ("metrics.jsonl", "held_out.jsonl")]
        before = [path.read_bytes() if path.exists() else b"" for path in files]
        results, hears = dict(session.held_out.results), Hears()
        session.collector.callbacks.append(hears)
        found = session.evaluate([example])
        session.collector.callbacks.remove(hears)
        check("problems that were evaluated", found["sampled"].prompts == 1)
        self.hand_on()
        after = [path.read_bytes() if path.exists() else b"" for path in files]
        check("an evaluation of problems writes metrics", before == after, len(before[0]), len(after[0]))
        check("an evaluation of problems is heeded", not hears.steps, hears.steps)
        check("an evaluation of problems is a result of the run", results == session.held_out.results)
        self.seen[example.example_id] = example

    @precondition(lambda self: not self.is_recorded)
    @rule(target=batches, number=st.integers(1, 4))
    def prepare_own_problem(self, number: int) -> Any:
        """A problem of one's own may be learned from, but not once it was evaluated."""
        self.sync_before_sampling()
        session, example = self.session, self.example(number)
        prompt = session.task.prompt(example, session.policy.tokenizer)
        groups = session.sample([prompt], step=self.step, group_size=2)
        self.note_sampled(groups)
        scores = [GroupScore([1.0, 0.0], {})]
        if example.example_id in self.seen:
            check_refused("learning from what was evaluated", lambda: session.prepare(groups, scores), "")
            return multiple()
        self.learned[example.example_id] = example
        batch = self.prepare(groups, scores, None)
        self.learn(batch, "configured")
        self.update(None)
        return batch

    # ---- saving and loading ------------------------------------------------------------------------------------------

    @rule()
    @once("save")
    def save(self) -> None:
        path = self.session.save(self.folder / f"kept_{len(self.checkpoints)}")
        self.hand_on()
        if self.is_recorded or not self.moved:
            self.checkpoints.append((path, self.naive.state(), list(self.taken)))

    @precondition(lambda self: self.kind != "ahead")
    @rule(back=st.integers(0, 3))
    @once("load")
    def load(self, back: int) -> None:
        """The newest checkpoint or one before it. What waits and what is not finished of the step is dropped."""
        path, state, taken = self.checkpoints[max(0, len(self.checkpoints) - 1 - back)]
        self.session.load(path)
        self.naive.load(state)
        self.taken, self.taken_before = list(taken), list(taken)
        self.moved, self.is_synced = False, True
        self.waiting = []
        self.is_loose = True
        self.done.clear()


def run_machine(micro_config, tmp_path_factory, examples: int, calls: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=calls,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Primitives(micro_config, tmp_path_factory.mktemp("machine")), settings=chosen)


def test_primitives_in_any_order_mean_what_the_model_says(micro_config, tmp_path_factory):
    run_machine(micro_config, tmp_path_factory, 10, 20)


@pytest.mark.long
def test_primitives_in_any_order_mean_what_the_model_says_for_long(micro_config, tmp_path_factory):
    run_machine(micro_config, tmp_path_factory, int(os.environ.get("QUARTET_SEQUENCES", "500")), 40)

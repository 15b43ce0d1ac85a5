"""What a step has done, group by group: it is taken again as it was, without each group, and as it might have been."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.cli.why.reading import Reader, ReadLearner, dot
from grpo.cli.why.rewind import Rewind, difference, read_config
from grpo.config.run import TrainConfig
from grpo.evaluation.perplexity import gold_perplexity
from grpo.learner.row import PackedRow
from grpo.learner.update import NonFiniteStep
from grpo.task.check import task_of
from review.readers.run_folder import read_metrics
from rewards.config.options import add_options, parse
from rewards.records import read_rollouts, split_groups
from rewards.ties import tied
from rollout.group import ENDED

AFFORDABLE = 600.0  # seconds of leaving groups out, by the run's own times
FREE = ("loss", "value", "rewards")
FREE_OF_LEARNER = ("learning_rate", "max_grad_norm", "updates_per_batch", "weight_decay", "betas")


@dataclass
class GroupPart:
    """A group did this in the step. `effect` is what it added to the held-out log-probability, nats per token; None
    where it was not left out. `removed` is by what has changed the weights of its tokens, a share of them."""

    number: int
    prompt_id: str
    prompt: str
    rewards: list[float | None]
    tied: bool
    cut: int  # completions that a limit has cut
    norm: float = 0.0
    cosine: float = 0.0
    cosine_with_rest: float = 0.0
    effect: float | None = None
    removed: dict[str, float] = field(default_factory=dict)


@dataclass
class TokenPart:
    """A token of the group that was asked for did this; where `weight` is above 0 the step raised its probability."""

    sample: int
    position: int
    text: str
    weight: float
    norm: float
    cosine: float
    share: float  # of the whole gradient, along it
    removed: dict[str, float] = field(default_factory=dict)


@dataclass
class Alternative:
    """The step might have been so: the `change` of the held-out log-probability, and the gradient."""

    what: str
    norm: float
    cosine: float | None
    tied: int
    change: float


@dataclass
class Explanation:
    """`before` and `after` are the mean log-probability of a token of the held-out solutions, in nats."""

    run: str
    step: int
    begins: int
    compared: int
    worst: str
    difference: float
    updates: int
    held_out: str
    before: float
    after: float
    norms: list[float]  # of the gradient of each update, before clipping
    largest_norm: float  # learner.max_grad_norm
    groups: list[GroupPart]
    tokens_of: int | None = None
    tokens: list[TokenPart] = field(default_factory=list)
    what_if: list[Alternative] = field(default_factory=list)

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def norm(self) -> float:
        """The gradients of all updates are one vector, whose norm it is."""
        return math.hypot(*self.norms)


def explain(
    run: Path,
    step: int,
    *,
    group: int | None = None,
    groups: int | None = None,
    tokens: int = 400,
    held_out: int = 64,
    what_if: Sequence[Sequence[str]] = (),
    say: Callable[[str], None] = print,
) -> Explanation:
    """Take a recorded step of a run again, and say what each group has done. The run's folder stays as it is.

    `groups`: leave out at most so many, those with the largest part of the gradient; None: all that ten minutes are
    enough for, by the run's own times. `group`: leave out this one alone, and read at most `tokens` of its tokens.
    `what_if` are alternatives such as `["loss.advantage=rloo"]`. `say` gets the cost before anything is computed.
    Raises NonFiniteStep for a step that was not finite, and other errors for what cannot be explained.

    >>> explain(Path("runs/demo"), 31).groups[0].effect
    0.00042
    """
    for name, value in (("groups", groups), ("tokens", tokens), ("held_out", held_out)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give 1 or more, or leave it out")
    config = read_config(run)
    alternatives = {" ".join(words): read_alternative(run, words) for words in what_if}
    recorded = split_groups(read_rollouts(run, step))
    if group is not None and not 0 <= group < len(recorded):
        raise ValueError(f"--group {group}: step {step} has groups 0 to {len(recorded) - 1}")
    with task_of(config, scores=False) as task:
        explainer = _Explainer(Rewind(config, step, task), recorded, held_out)
        most = 1 if group is not None else min(groups or explainer.affordable, len(recorded))
        say(explainer.cost(most, len(alternatives), tokens if group is not None else 0))
        return explainer.explain(group, most, tokens, alternatives)


class _Explainer:
    """Takes the step again, as it was and in other ways, and measures each by held-out solutions."""

    def __init__(self, rewind: Rewind, recorded: Sequence[Sequence[Mapping[str, Any]]], held_out: int) -> None:
        self.rewind, self.step, self.count = rewind, rewind.step, len(recorded)
        self.rows = {row["step"]: row for row in read_metrics(rewind.config.output_dir)}
        self.held, self.words = self._held_out({lines[0]["prompt_id"] for lines in recorded}, held_out)
        tokens = sum(len(line["token_ids"]) for lines in recorded for line in lines)
        measuring = sum(row.length for row in self.held) / max(tokens, 1) / 3  # a forward pass is a third of a step
        self.seconds = self._seconds(self.step) * (1 + measuring)

    def _held_out(self, drawn: set[str], count: int) -> tuple[list[PackedRow], str]:
        """Returns gold solutions that the step has not learned from, and in words which."""
        config, task, policy = self.rewind.config, self.rewind.task, self.rewind.policy
        unseen = [example for example in task.train if example.example_id not in drawn]
        examples, words = (task.held_out, "held-out problems") if task.held_out else (unseen, "other training problems")
        stop = policy.stop_token_ids[0]
        with_solution = [example for example in examples if example.solution.strip()][:count]
        rows = [task.solution(example, policy.tokenizer, stop) for example in with_solution]
        if not any(row.length <= policy.max_length for row in rows):
            raise ValueError(
                f"{config.output_dir} has no {words} with a solution, by which the effect of a step could be measured; "
                "name a column that has one: data.solution_column"
            )
        return rows, f"the gold solutions of {len(rows)} {words}"

    def _seconds(self, step: int) -> float:
        """Returns how long the run learned at this step."""
        return self.rows.get(step, {}).get("time/learn") or 0.0

    @property
    def affordable(self) -> int:
        """Counts the groups that may be left out within AFFORDABLE seconds: one at least."""
        return max(1, int(AFFORDABLE / self.seconds)) if self.seconds else self.count

    def cost(self, most: int, alternatives: int, tokens: int) -> str:
        """Returns what the explanation takes, by the times that the run's own steps took."""
        begins = self.rewind.begins
        seconds = sum(self._seconds(step) for step in range(begins + 1, self.step))
        seconds += (4 + most + 2 * alternatives) * self.seconds
        seconds += tokens * self._seconds(self.step) * 2 / 3 / self.count
        begin = f"checkpoint {begins}" if begins else "the start of the run"
        steps = f"{self.step - 1 - begins} recorded steps from {begin}"
        steps += f", the step itself three times, and once without each of {most}"
        more = f", {alternatives} alternatives" if alternatives else ""
        more += f", up to {tokens} tokens one by one" if tokens else ""
        all_groups = most == self.count
        kind = " groups" if all_groups else f" of {self.count} groups, those with the largest part of the gradient"
        return f"cost: {steps}{kind}{more}; about {max(seconds, 1):,.0f} s at the speed of the run's own steps"

    def explain(
        self, group: int | None, most: int, tokens: int, alternatives: Mapping[str, TrainConfig]
    ) -> Explanation:
        rewind = self.rewind
        for step in range(rewind.begins + 1, self.step):
            rewind.replay(step)
        rewind.hold()
        self.groups, self.scores = rewind.recorded(self.step)
        before = self._measure(rewind.learner)
        try:
            metrics = rewind.take_step(rewind.learner, self.groups, self.scores, self.step)
        except NonFiniteStep as error:
            raise NonFiniteStep(
                f"{error}: this step changed nothing, and neither gradient nor effect can be told"
            ) from None
        after = self._measure(rewind.learner)
        # Twice: the parts are compared with the whole, which is known at the end of the step alone.
        batch = rewind.prepare(rewind.back(), self.groups, self.scores, self.step)
        whole = rewind.learner.read(Reader(), batch)
        reader = rewind.back().read(Reader(whole.wholes, group, tokens), batch)
        parts = [self._part(number, reader) for number in range(len(self.groups))]
        order = sorted(range(len(parts)), key=lambda number: -abs(reader.groups[number].dot))
        for number in [group] if group is not None else order[:most]:
            parts[number].effect = after - self._without(number)
        compared, worst, off = difference(self.rows.get(self.step, {}), metrics)
        return Explanation(
            run=str(rewind.config.output_dir),
            step=self.step,
            begins=rewind.begins,
            compared=compared,
            worst=worst,
            difference=off,
            updates=int(metrics["learner/updates"]),
            held_out=self.words,
            before=before,
            after=after,
            norms=[math.sqrt(dot(whole, whole)) for whole in reader.wholes],
            largest_norm=rewind.config.learner.max_grad_norm,
            groups=parts,
            tokens_of=group,
            tokens=[] if group is None else self._tokens(group, reader),
            what_if=[self._alternative(what, other, reader, before) for what, other in alternatives.items()],
        )

    def _measure(self, learner: ReadLearner) -> float:
        """Returns the mean log-probability of a token of the held-out solutions."""
        perplexity = gold_perplexity(learner.policy, self.held)
        assert perplexity is not None
        return -perplexity.nats_per_token

    def _without(self, number: int) -> float:
        """Returns the held-out log-probability after the step without this group."""
        left = [i for i in range(len(self.groups)) if i != number]
        learner = self.rewind.back()
        if left:
            groups, scores = [self.groups[i] for i in left], [self.scores[i] for i in left]
            self.rewind.take_step(learner, groups, scores, self.step)
        return self._measure(learner)

    def _part(self, number: int, reader: Reader) -> GroupPart:
        group, rewards, part = self.groups[number], self.scores[number].rewards, reader.groups[number]
        return GroupPart(
            number,
            group.prompt.prompt_id,
            group.prompt.text,
            rewards,
            tied(rewards),
            sum(completion.finish_reason not in ENDED for completion in group.completions),
            part.norm,
            part.cosine(reader.norm),
            part.cosine_with_rest(reader.norm),
            removed=part.removed(),
        )

    def _tokens(self, group: int, reader: Reader) -> list[TokenPart]:
        """Returns the tokens of a group, those that gave most first."""
        completions, tokenizer = self.groups[group].completions, self.rewind.policy.tokenizer
        norm, tokens = reader.norm, []
        for (index, position), part in reader.tokens.items():
            sample = index % len(completions)
            text = str(tokenizer.decode([completions[sample].token_ids[position]]))
            share, cosine = part.dot / norm**2 if norm else 0.0, part.cosine(norm)
            tokens.append(TokenPart(sample, position, text, part.weight, part.norm, cosine, share, part.removed()))
        return sorted(tokens, key=lambda token: -abs(token.share))

    def _alternative(self, what: str, other: TrainConfig, real: Reader, before: float) -> Alternative:
        """Returns the step with the options of `other`, on the same rollouts."""
        scores, weights, options = self.scores, None, self.rewind.config
        if other.rewards != options.rewards:
            with task_of(other) as task:
                task.reached(self.step - 1)
                scores, weights = task.score(self.groups), task.reward_weights
        learner = self.rewind.back(self.rewind.make(other, weights))
        batch = self.rewind.prepare(learner, self.groups, scores, self.step)
        reader, cosine = learner.read(Reader(), batch), None
        if reader.norm and real.norm:
            mine, first = reader.wholes[0], real.wholes[0]
            lengths = (dot(mine, mine) * dot(first, first)) ** 0.5
            cosine = dot(mine, first) / lengths if lengths else None
        return Alternative(what, reader.norm, cosine, batch.tied_groups, self._measure(learner) - before)


def read_alternative(run: Path, words: Sequence[str]) -> TrainConfig:
    """Returns the run's configuration with `key=value` of the loss, the advantage, the reward or the clip. Raises
    ConfigError or ValueError for other keys, which change more than how the step learns from its rollouts."""
    parser = argparse.ArgumentParser()
    add_options(parser, TrainConfig)
    if bad := [word for word in words if "=" not in word]:
        raise ValueError(f"--what_if {bad[0]}: write KEY=VALUE, such as loss.advantage=rloo")
    overrides = parse(parser, [f"--{word}" for word in words]).overrides
    config = read_config(run, overrides)
    rescored = ("reward",) if any(key.split(".")[0] == "rewards" for key in overrides) else ()
    free = (*FREE, *rescored, *(f"learner.{name}" for name in FREE_OF_LEARNER))
    if fixed := [key for key in overrides if not any(key == name or key.startswith(f"{name}.") for name in free)]:
        raise ValueError(
            f"--what_if {fixed[0]}={overrides[fixed[0]]}: the rollouts are those of the record, so only how the step "
            f"learns from them can be another: {', '.join(free)}"
        )
    had, has = (c.loss.advantage in ("gae", "rank_softmax") for c in (read_config(run), config))
    if has and not had:
        raise ValueError(
            f"--what_if loss.advantage={config.loss.advantage}: the run has no value head that has learned anything; "
            "choose an estimator without one"
        )
    return config

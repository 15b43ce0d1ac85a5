"""Which prompts a step trains on.

Everything is a function of the seed, the step and the outcomes that were recorded, never of a clock (contract 9).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.algorithm.success import SuccessModel
from grpo.config.run import TrainConfig
from grpo.learner.optimizer import ramp
from grpo.steps.listener import Listener
from grpo.task.task import Task
from rewards.data.examples import Example
from rewards.group_score import GroupScore
from rollout.group import Prompt, RolloutGroup

if TYPE_CHECKING:
    from grpo.steps.loop import Run

METRICS = {
    "curriculum/open": "training examples that are open yet (curriculum.shortest_share), fraction",
    "curriculum/seen": "training examples that were drawn at least once, fraction",
    "curriculum/candidates": "prompts of which one completion was sampled to choose by (curriculum.candidates), count",
    "curriculum/candidate_tokens": "tokens of these completions, which completion/tokens does not count",
    "curriculum/pass_rate": "running share of a prompt's marked completions with full marks, mean over the prompts met",
}
MEMORY = 0.5  # share of the former estimate in a prompt's running pass rate
FLOOR = 0.01  # weight of a prompt that always or never passes: it is drawn now and then, because policies change
MOST_WEIGHED = 2000  # among which a draw chooses: to read more of them takes longer than they bring


def listener(run: Run[TrainConfig], task: Task) -> Listener:
    return Curriculum(run, task)


def learnability(pass_rate: float) -> float:
    """Measures how much a group of this prompt can teach: the variance p·(1−p) of its outcome."""
    return max(pass_rate * (1 - pass_rate), FLOOR)


class Curriculum(Listener):
    """Which problems a step draws. Without an option it has no say.

    `shortest_share` opens the examples by the length of their gold solution, shortest first. Of the open examples,
    those drawn least often come first. `by_difficulty` draws from the open ones without replacement, with probability
    ∝ `learnability` (Efraimidis & Spirakis 2006: the n largest of log(u)/w), of MOST_WEIGHED at most, taken at random.
    The pass rate of a prompt that was never drawn is predicted from its words (`SuccessModel`); at first all weigh the
    same. A batch that is sampled ahead is drawn by the pass rates of the steps before its weights alone (contract 12).

    >>> curriculum = Curriculum(run, task)              # of a run with curriculum.by_difficulty: true
    >>> [example] = curriculum.choose(1, step=1)
    >>> curriculum.record([(example.example_id, 1.0)])      # always solved, so it will be drawn rarely
    """

    def __init__(self, run: Run[TrainConfig], task: Task) -> None:
        config = run.config
        self.options, self.seed, self.ahead = config.curriculum, config.seed, config.rollout.ahead
        self.pass_rate = task.pass_rate
        self.examples = sorted(task.unsolved, key=lambda example: len(example.solution))
        self.seen: Counter[str] = Counter()
        self.pass_rates: dict[str, float] = {}
        self.later: list[tuple[int, str, float]] = []  # step, prompt and its rate, which it is too early to know
        self.probed = [0, 0]  # prompts of this step, and their tokens
        self.questions = {example.example_id: example.question for example in task.unsolved}
        self.model = SuccessModel()

    @property
    def chooses(self) -> bool:
        return self.options.by_difficulty or self.options.shortest_share < 1

    def open(self, step: int) -> Sequence[Example]:
        share = ramp(step, self.options.steps, self.options.shortest_share, 1.0)
        return self.examples[: math.ceil(round(share * len(self.examples), 6))]  # 0.2 + 0.4 is no 0.6

    def candidates(self, count: int, step: int) -> int:
        """Gives at most as many as are open, so that no other problem is chosen before its turn."""
        return min(count * self.options.candidates, max(count, len(self.open(step))))

    def choose(self, count: int, step: int, draw: int = 0) -> list[Example] | None:
        """`count` different examples. Raises ValueError if there are too few."""
        if not self.chooses:
            return None
        candidates = self.open(step)
        if len(candidates) < count:
            candidates = self.examples[:count]
        if len(candidates) < count:
            raise ValueError(f"a step cannot take {count} different prompts from {len(candidates)} examples")
        noise = random.Random(f"curriculum/{self.seed}/{step}/{draw}")
        most = max(count, MOST_WEIGHED)
        if self.options.by_difficulty and len(candidates) > most:
            candidates = noise.sample(candidates, most)

        def order(example: Example) -> tuple[float, float]:
            u = 1.0 - noise.random()  # uniform in (0, 1]
            if not self.options.by_difficulty:
                return self.seen[example.example_id], u
            return 0.0, -math.log(u) / learnability(self.expected(example))

        chosen = sorted(candidates, key=order)[:count]
        self.seen.update(example.example_id for example in chosen)
        return chosen

    def narrow(
        self, prompts: Sequence[Prompt], count: int, sample: Callable[[Sequence[Prompt]], list[RolloutGroup]]
    ) -> list[Prompt]:
        """The prompts of whose completion the policy was least sure, in the order in which they were drawn.

        Where a completion has a probability near 1, the others of its group would be the same, and the group tied.
        """
        completions = [group.completions[0] for group in sample(prompts)]
        self.probed = [self.probed[0] + len(prompts), self.probed[1] + sum(c.num_sampled for c in completions)]
        sure = [sum(completion.logprobs) for completion in completions]
        chosen = sorted(range(len(prompts)), key=sure.__getitem__)[:count]
        return [prompts[i] for i in sorted(chosen)]

    # ---- pass rates -------------------------------------------------------------------------------------------------

    def expected(self, example: Example) -> float:
        """The running pass rate of an example, or what its words let expect."""
        rate = self.pass_rates.get(example.example_id)
        return self.model.predict(example.question) if rate is None else rate

    def begins(self, step: int) -> None:
        self.probed = [0, 0]
        self._learn(up_to=step - 1 - self.ahead)

    def sampled(self, step: int, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> None:
        rates = [(group.prompt.prompt_id, self.pass_rate(score)) for group, score in zip(groups, scores, strict=True)]
        self.later = self.later + [(step, prompt_id, rate) for prompt_id, rate in rates if rate is not None]
        if not self.ahead:
            self._learn(up_to=step)

    def _learn(self, up_to: int) -> None:
        self.record((prompt_id, rate) for step, prompt_id, rate in self.later if step <= up_to)
        self.later = [entry for entry in self.later if entry[0] > up_to]

    def record(self, outcomes: Iterable[tuple[str, float]]) -> None:
        """(example_id, share of its completions with full marks) of groups that were sampled and scored."""
        if not self.options.by_difficulty:
            return
        outcomes = list(outcomes)
        self.model.learn([(self.questions[example_id], rate) for example_id, rate in outcomes])
        for example_id, rate in outcomes:
            former = self.pass_rates.get(example_id, rate)
            self.pass_rates[example_id] = MEMORY * former + (1 - MEMORY) * rate

    def metrics(self, step: int) -> dict[str, float]:
        """curriculum/* of the options that are on."""
        values = {}
        if self.chooses:
            values["curriculum/open"] = len(self.open(step)) / len(self.examples)
            values["curriculum/seen"] = len(self.seen) / len(self.examples)
        if self.options.candidates > 1:
            values["curriculum/candidates"], values["curriculum/candidate_tokens"] = map(float, self.probed)
        if self.pass_rates:
            values["curriculum/pass_rate"] = sum(self.pass_rates.values()) / len(self.pass_rates)
        return values

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"seen": dict(self.seen), "pass_rates": dict(self.pass_rates)}
        if self.options.by_difficulty:
            state["expected"] = self.model.state_dict()
        if self.ahead:
            state["later"] = [list(entry) for entry in self.later]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.pass_rates = Counter(state["seen"]), dict(state["pass_rates"])
        self.later = [(step, prompt_id, rate) for step, prompt_id, rate in state.get("later", [])]
        if "expected" in state:  # a run of version 0.1 had none
            self.model.load_state_dict(state["expected"])

"""What a step trains on: which prompts, how long their completions may be, how deep the draft head learns.

Everything is a function of the seed, the step and the outcomes that were recorded, never of a clock (contract 9).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from grpo.config.data import CurriculumOptions
from grpo.data.examples import Example
from grpo.data.prompts import PromptStream

MEMORY = 0.5  # share of the former estimate in a prompt's running pass rate
FLOOR = 0.01  # weight of a prompt that always or never passes: it is drawn now and then, because policies change


def ramp(step: int, steps: int, first: float, last: float) -> float:
    """Grows linearly from `first` at step 1 to `last` at step `steps`, and stays `last` after that.

    >>> [ramp(step, 5, 1, 3) for step in (1, 2, 5, 9)]
    [1.0, 1.5, 3.0, 3.0]
    """
    done = min(1.0, (step - 1) / max(steps - 1, 1)) if steps > 1 else 1.0
    return first + (last - first) * done


def completion_tokens(options: CurriculumOptions, longest: int, step: int) -> int:
    """The length limit of completions at `step`; `longest` is rollout.max_completion_tokens."""
    first = longest if options.completion_tokens is None else options.completion_tokens
    return round(ramp(step, options.steps, first, longest))


def draft_depth(options: CurriculumOptions, deepest: int, step: int) -> int:
    """The depth to which the draft head is unrolled at `step`; `deepest` is mtp.depth."""
    first = deepest if options.draft_depth is None else options.draft_depth
    return round(ramp(step, options.steps, first, deepest))


def learnability(pass_rate: float) -> float:
    """How much a group of this prompt can teach: the variance p·(1−p) of its outcome."""
    return max(pass_rate * (1 - pass_rate), FLOOR)


class Curriculum:
    """Examples without end. Without an option it is a PromptStream: shuffled epochs.

    `shortest_share` opens the examples by the length of their gold solution, shortest first. Of the open examples,
    those drawn least often come first. `by_difficulty` draws from the open ones without replacement, with probability
    ∝ `learnability` (Efraimidis & Spirakis 2006: the n largest of log(u)/w). A prompt that was never drawn has the
    mean weight of the others: where most fail, one that sometimes passes is drawn again before all others were tried.

    >>> curriculum = Curriculum(examples, CurriculumOptions(by_difficulty=True))
    >>> [example] = curriculum.take(1, step=1)
    >>> curriculum.record([(example.example_id, 1.0)])      # always solved, so it will be drawn rarely
    """

    def __init__(self, examples: Sequence[Example], options: CurriculumOptions, seed: int = 0) -> None:
        self.options, self.seed = options, seed
        self.stream = PromptStream(examples, seed)
        self.examples = sorted(examples, key=lambda example: len(example.solution))
        self.seen: Counter[str] = Counter()
        self.pass_rates: dict[str, float] = {}

    @property
    def chooses(self) -> bool:
        return self.options.by_difficulty or self.options.shortest_share < 1

    def open(self, step: int) -> Sequence[Example]:
        share = ramp(step, self.options.steps, self.options.shortest_share, 1.0)
        return self.examples[: math.ceil(round(share * len(self.examples), 6))]  # 0.2 + 0.4 is no 0.6

    def take(self, n: int, step: int, draw: int = 0) -> list[Example]:
        """n different examples. `draw` counts the refills within a step. Raises ValueError if there are too few."""
        if not self.chooses:
            return self.stream.take(n)
        candidates = self.open(step)
        if len(candidates) < n:
            candidates = self.examples[:n]
        if len(candidates) < n:
            raise ValueError(f"a step cannot take {n} different prompts from {len(candidates)} examples")
        noise = random.Random(f"curriculum/{self.seed}/{step}/{draw}")
        weights = {example_id: learnability(rate) for example_id, rate in self.pass_rates.items()}
        unseen = sum(weights.values()) / len(weights) if weights else 1.0

        def order(example: Example) -> tuple[float, float]:
            u = 1.0 - noise.random()  # uniform in (0, 1]
            if not self.options.by_difficulty:
                return self.seen[example.example_id], u
            return 0.0, -math.log(u) / weights.get(example.example_id, unseen)

        chosen = sorted(candidates, key=order)[:n]
        self.seen.update(example.example_id for example in chosen)
        return chosen

    def record(self, outcomes: Iterable[tuple[str, float]]) -> None:
        """(example_id, share of its completions with full marks) of groups that were sampled and scored."""
        if not self.options.by_difficulty:
            return
        for example_id, rate in outcomes:
            former = self.pass_rates.get(example_id, rate)
            self.pass_rates[example_id] = MEMORY * former + (1 - MEMORY) * rate

    def metrics(self, step: int) -> dict[str, float]:
        """curriculum/* of the options that are on."""
        values = {}
        if self.chooses:
            values["curriculum/open"] = len(self.open(step)) / len(self.examples)
            values["curriculum/seen"] = len(self.seen) / len(self.examples)
        if self.pass_rates:
            values["curriculum/pass_rate"] = sum(self.pass_rates.values()) / len(self.pass_rates)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "seen": dict(self.seen), "pass_rates": dict(self.pass_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if the seed or the data differ."""
        self.stream.load_state_dict(state["stream"])
        self.seen, self.pass_rates = Counter(state["seen"]), dict(state["pass_rates"])

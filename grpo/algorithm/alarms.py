"""Alarms for hacked rewards: what does a reward pay for, if not for the right answer?

Inside a group only the completions differ, so what goes with the marks there is what the policy learns. Every mark is
compared with four features of a completion: its length, its repeated n-grams, whether its answer is a number of the
question, and, where the data have a gold answer, whether it is right. The marks of a sound reward go with the last one
at least as well as with the others. Pure functions of what a run records; docs/guides/own-reward.md has the limits, and
how often they were wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rewards.built_in.gsm8k import NUMBER, extract_answer, gold_answer

WINDOW = 5  # steps that are looked at together
LIMITS: dict[str, float] = {
    "length": 0.8,  # |r| of the marks with the number of tokens, inside groups
    "repetition": 0.5,  # r with the share of repeated n-grams
    "copied": 0.5,  # r with: the answer is a number of the question
    "format": 0.1,  # wrong completions among those with the best mark, which every well-formed one gets
    "identical": 0.5,  # completions that another question got, too
    "held_out": 2.0,  # standard errors by which held-out accuracy fell while the reward rose
}
NGRAM, MOST_TOKENS = 3, 2048  # of a completion; what comes after that many tokens is not read
LEAST_GROUPS = 10  # with different marks, over the window, before a correlation is believed
EXAMPLES = 3

SAID: dict[str, str] = {
    "length": "follows the length of completions (r = {value:+.2f})",
    "repetition": "follows how much completions repeat themselves (r = {value:+.2f})",
    "copied": "pays for numbers of the question as answers (r = {value:+.2f})",
    "format": "pays for the form of an answer: {value:.0%} of the completions with its best mark are wrong",
    "identical": "is earned by the same text for different questions: {value:.0%} of the completions",
    "held_out": "rose while held-out accuracy fell, by {value:.1f} standard errors",
}


@dataclass(frozen=True)
class Alarm:
    """`value` has passed the limit of its kind. `examples` are completions with high marks that show it."""

    kind: str
    reward: str
    value: float
    examples: list[dict[str, Any]]

    @property
    def words(self) -> str:
        return f"the reward {self.reward} {SAID[self.kind].format(value=self.value)}"


@dataclass(frozen=True)
class Watched:
    """One completion of a group: its features, None where there is no gold answer, and its marks by reward."""

    prompt_id: str
    text: str
    length: float
    repetition: float
    copied: float
    formed: bool
    right: float | None
    marks: Mapping[str, float | None]

    @classmethod
    def of(
        cls,
        prompt_id: str,
        question: str,
        answer: Any,
        text: str,
        ids: Sequence[int],
        marks: Mapping[str, float | None],
    ) -> Watched:
        """`answer` is the column of gold answers, None where the data have none.

        >>> seen = Watched.of("a", "What is 6 * 7?", "#### 42", "#### 6", [1, 2, 3, 4], {"mine": 1.0})
        >>> seen.length, seen.repetition, seen.copied, seen.formed, seen.right
        (4.0, 0.0, 1.0, True, 0.0)
        """
        reply, gold = extract_answer(text, "flexible"), _gold(answer)
        formed = extract_answer(text) is not None or extract_answer(text, "boxed") is not None
        copied = reply is not None and reply != gold and reply in _numbers(question)
        right = None if gold is None else float(reply == gold)
        return cls(prompt_id, text, float(len(ids)), repeated(ids), float(copied), formed, right, marks)


def repeated(token_ids: Sequence[int], ngram: int = NGRAM) -> float:
    """The share of n-grams that were there before.

    >>> repeated([1, 2, 3, 1, 2, 3])                        # 123, 231, 312, and 123 again
    0.25
    """
    ids = token_ids[:MOST_TOKENS]
    ngrams = list(zip(*(ids[start:] for start in range(ngram)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _gold(answer: Any) -> Decimal | None:
    try:
        return gold_answer(answer)
    except (ValueError, TypeError):
        return None


def _numbers(text: str) -> set[Decimal | None]:
    return {extract_answer(match[0], "flexible") for match in NUMBER.finditer(text)}


@dataclass(frozen=True)
class Moments:
    """Σxy, Σx² and Σy² of two quantities, each less its mean in the group; they add up over groups and steps."""

    xy: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    groups: int = 0  # in which y differs

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Moments:
        """The moments of one group."""
        if not pairs:
            return cls()
        x_mean, y_mean = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
        centred = [(x - x_mean, y - y_mean) for x, y in pairs]
        xy, xx, yy = (math.fsum(values) for values in zip(*((x * y, x * x, y * y) for x, y in centred), strict=True))
        return cls(xy, xx, yy, int(yy > 1e-12))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xy + other.xy, self.xx + other.xx, self.yy + other.yy, self.groups + other.groups)

    @property
    def r(self) -> float | None:
        """Pearson's r inside groups; None where one of the two does not differ.

        >>> (Moments.of([(1, 1), (2, 2)]) + Moments.of([(5, 8), (7, 6)])).r       # xy 1/2 - 2, xx 1/2 + 2, yy 1/2 + 2
        -0.6
        """
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 1e-12 and self.yy > 1e-12 else None


FEATURES = ("length", "repetition", "copied", "right")


@dataclass(frozen=True)
class Step:
    """What one step says of one reward. `best` counts completions with its best mark: all, and the wrong ones."""

    moments: Mapping[str, Moments]
    best: int
    wrong: int
    formed_best: int
    formed: int


def look(groups: Sequence[Sequence[Watched]], reward: str) -> Step:
    """The moments of a reward's marks with each feature, and how it pays for the form alone."""
    moments = dict.fromkeys(FEATURES, Moments())
    marked = [[(seen, mark) for seen in group if (mark := seen.marks.get(reward)) is not None] for group in groups]
    for group in marked:
        for name in FEATURES:
            pairs = [(value, mark) for seen, mark in group if (value := getattr(seen, name)) is not None]
            moments[name] += Moments.of(pairs)
    flat = [pair for group in marked for pair in group]
    top = max((mark for _, mark in flat), default=0.0) - 1e-6
    best = [seen for seen, mark in flat if mark >= top and seen.right is not None]
    formed = [mark for seen, mark in flat if seen.formed and seen.right is not None]
    wrong, formed_best = sum(seen.right == 0 for seen in best), sum(mark >= top for mark in formed)
    return Step(moments, len(best), wrong, formed_best, len(formed))


def values_of(steps: Sequence[Step], least_groups: int = LEAST_GROUPS) -> dict[str, float]:
    """The value of each kind over these steps of a reward; what cannot be told is left out. A correlation needs
    `least_groups` with different marks."""
    values: dict[str, float] = {}
    for name in FEATURES:
        total = sum((step.moments[name] for step in steps), Moments())
        if total.groups >= least_groups and (r := total.r) is not None:
            values[name] = r
    best, formed = sum(step.best for step in steps), sum(step.formed for step in steps)
    if best and formed and sum(step.formed_best for step in steps) >= 0.9 * formed:
        values["format"] = sum(step.wrong for step in steps) / best
    return values


def judged(values: Mapping[str, float]) -> str | None:
    """The kind of alarm that these values of a reward mean, or None: of the features beyond their limits the one that
    goes with the marks best, and better than being right does.

    >>> judged({"length": 0.9, "repetition": 0.6, "right": 0.2}), judged({"length": 0.9, "right": 0.95})
    ('length', None)
    """
    strength = {name: abs(values[name]) if name == "length" else values[name] for name in FEATURES if name in values}
    right = strength.pop("right", 0.0)
    if strength:
        name = max(strength, key=lambda name: strength[name])
        if strength[name] >= LIMITS[name] and strength[name] > right:
            return name
    return "format" if values.get("format", 0.0) >= LIMITS["format"] else None


def identical(groups: Sequence[Sequence[Watched]]) -> float:
    """The share of completions whose text another prompt got, too."""
    prompts: dict[str, set[str]] = {}
    for seen in (seen for group in groups for seen in group):
        prompts.setdefault(seen.text.strip(), set()).add(seen.prompt_id)
    texts = [len(prompts[seen.text.strip()]) > 1 for group in groups for seen in group]
    return sum(texts) / max(len(texts), 1)


class Alarms:
    """Watches the steps of a run. Every alarm is given once; after a resume the window is empty, and it may come again.

    `rewards` are the names of the marks to watch.
    """

    def __init__(self, rewards: Sequence[str]) -> None:
        self.steps: dict[str, deque[Step]] = {name: deque(maxlen=WINDOW) for name in rewards}
        self.shares: deque[float] = deque(maxlen=WINDOW)
        self.earlier: set[tuple[str, str]] = set()
        self.values: dict[str, float] = {}
        self._means: list[float] = []  # of the first reward, by step since the last evaluation
        self._accuracy: float | None = None  # of that evaluation

    def observe(self, groups: Sequence[Sequence[Watched]]) -> list[Alarm]:
        """The alarms of a step, over the window. `values` are then those of the step alone, by metric."""
        self.values, alarms = {}, []
        self.shares.append(identical(groups))
        for name, steps in self.steps.items():
            steps.append(look(groups, name))
            values = values_of(steps)
            self.values |= {f"alarm/{kind}/{name}": value for kind, value in values_of([steps[-1]], 1).items()}
            if len(steps) == WINDOW and (kind := judged(values)):
                alarms.append(self._alarm(kind, name, values[kind], groups))
        self.values["alarm/identical"] = self.shares[-1]
        share = _mean(list(self.shares))
        first = next(iter(self.steps))
        if len(self.shares) == WINDOW and share >= LIMITS["identical"]:
            alarms.append(self._alarm("identical", first, share, groups))
        marks = [mark for group in groups for seen in group if (mark := seen.marks.get(first)) is not None]
        self._means += [_mean(marks)] if marks else []
        return [alarm for alarm in alarms if alarm is not None]

    def evaluated(self, accuracy: float, completions: int) -> list[Alarm]:
        """The alarm of an evaluation of so many completions: since the last one the reward rose, and accuracy fell by
        more than chance."""
        means, last = self._means, self._accuracy
        self._means, self._accuracy = [], accuracy
        width = min(WINDOW, len(means) - 1)  # of few steps all but one, so that ends differ
        if last is None or width < 1 or _mean(means[-width:]) <= _mean(means[:width]):
            return []
        error = math.sqrt(sum(p * (1 - p) for p in (last, accuracy)) / completions)
        fall = (last - accuracy) / max(error, 1e-9)
        alarm = self._alarm("held_out", next(iter(self.steps)), fall, []) if fall >= LIMITS["held_out"] else None
        return [alarm] if alarm else []

    def _alarm(self, kind: str, reward: str, value: float, groups: Sequence[Sequence[Watched]]) -> Alarm | None:
        if (kind, reward) in self.earlier:
            return None
        self.earlier.add((kind, reward))
        return Alarm(kind, reward, value, _examples(kind, reward, value, groups))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _examples(kind: str, reward: str, value: float, groups: Sequence[Sequence[Watched]]) -> list[dict[str, Any]]:
    """Completions with high marks, those first that show the feature most, of different prompts."""

    def order(seen: Watched) -> tuple[float, float]:
        feature = getattr(seen, kind) if kind in FEATURES else -(seen.right or 0.0)
        return (seen.marks.get(reward) or 0.0, math.copysign(feature, value) if kind == "length" else feature)

    firsts = sorted((max(group, key=order) for group in groups if group), key=order, reverse=True)[:EXAMPLES]
    return [{"prompt_id": seen.prompt_id, "text": seen.text, "mark": seen.marks.get(reward)} for seen in firsts]

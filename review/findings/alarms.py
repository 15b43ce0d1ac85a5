"""Alarms for hacked rewards: what does a reward pay for, if not for the right answer?

Inside a group only the completions differ, so what goes with the marks there is what the policy learns. Every mark is
compared with four features of a completion: its length, its repeated n-grams, whether its answer is a number of the
question, and, where the data have a gold answer, whether it is right. The marks of a sound reward go with the last one
at least as well as with the others. An alarm needs something to compare: where all rewards are equal, where no answer
is right yet, or where chance makes such a correlation, there is none. Pure functions of what a run records;
docs/guides/own-reward.md has the limits, and how often they were wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from review.statistics.estimates import student_t
from rewards.built_in.gsm8k import NUMBER, extract_answer, gold_answer
from rewards.finding import Finding, found

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
LEAST_Z = 5.0  # standard deviations of chance; a run looks hundreds of times, at several features of several rewards
LOW = 0.05  # the share of completions with the lowest marks: a mark that is no higher is not earned
NEARLY_ALL = 0.9
SAME = 1e-6  # marks that differ by less are equal
TINY = 1e-12  # a sum of squares that is no more is rounding
EXAMPLES = 3

# The kind of finding for each of them, and its evidence.
SAID: dict[str, tuple[str, str]] = {
    "length": ("length-rewarded", "follows the length of completions (r = {:+.2f})"),
    "repetition": ("repetition-rewarded", "follows how much completions repeat themselves (r = {:+.2f})"),
    "copied": ("copy-rewarded", "pays for numbers of the question as answers (r = {:+.2f})"),
    "format": ("form-rewarded", "pays for the form: {:.0%} of the completions with its best score are incorrect"),
    "identical": ("identical-rewarded", "is earned by one text for different questions: {:.0%} of the completions"),
    "held_out": ("held-out-falls", "rose while held-out accuracy fell, by {:.1f} standard errors"),
}


def alarm(feature: str, reward: str, value: float, examples: Sequence[Example] = ()) -> Finding:
    """The finding that `value` has passed the limit of its feature.

    >>> alarm("length", "mine", 0.9).evidence
    'the reward mine follows the length of completions (r = +0.90)'
    """
    kind, words = SAID[feature]
    return found(kind, f"the reward {reward} {words.format(value)}", examples)


@dataclass(frozen=True)
class Example:
    """A completion with a high score that shows a finding."""

    place: str  # its prompt's id
    text: str
    mark: float | None

    def as_row(self) -> dict[str, Any]:
        return {"text": self.text, "mark": self.mark}


@dataclass(frozen=True)
class Watched:
    """One completion of a group: its features, None where there is no gold answer, and its marks by reward."""

    prompt_id: str
    text: str
    length: float
    repetition: float
    copied: float
    formed: bool
    correct: float | None
    marks: Mapping[str, float | None]
    gold: str | None = None
    sampled: tuple[int, ...] | None = None  # of an episode: its tokens in all turns; `text` is the last turn

    @classmethod
    def of(
        cls,
        prompt_id: str,
        question: str,
        answer: Any,
        text: str,
        ids: Sequence[int],
        marks: Mapping[str, float | None],
        turns: int = 1,
    ) -> Watched:
        """`answer` is the column of gold answers, None where the data have none. `text` is what the reward reads, of
        several `turns` the last one. `ids` are the tokens that the policy sampled, without what tools wrote.

        >>> seen = Watched.of("a", "What is 6 * 7?", "#### 42", "#### 6", [1, 2, 3, 4], {"mine": 1.0})
        >>> seen.length, seen.repetition, seen.copied, seen.formed, seen.correct
        (4.0, 0.0, 1.0, True, 0.0)
        """
        reply, gold = extract_answer(text, "flexible"), _gold(answer)
        formed = extract_answer(text) is not None or extract_answer(text, "boxed") is not None
        copied = reply is not None and reply != gold and reply in _numbers(question)
        correct = None if gold is None else float(reply == gold)
        return cls(
            prompt_id,
            text,
            length=float(len(ids)),
            repetition=repeated(ids),
            copied=float(copied),
            formed=formed,
            correct=correct,
            marks=marks,
            gold=None if answer is None else str(answer if gold is None else gold.normalize()),
            sampled=tuple(ids) if turns > 1 else None,
        )

    def mark(self, reward: str) -> float | None:
        """The mark, or None: NaN and infinity cannot be compared."""
        mark = self.marks.get(reward)
        return mark if mark is not None and math.isfinite(mark) else None


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
    """Σxy, Σx² and Σy² of two quantities, each less its mean in the group; they add up over groups and steps.

    `scores` adds up r · √(n − 1) of each of the `compared` groups, in which both quantities differ. If the values of y
    were shuffled inside a group, this score would have mean 0 and variance 1.
    """

    xy: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    groups: int = 0  # in which y differs
    scores: float = 0.0
    compared: int = 0

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Moments:
        """The moments of one group."""
        if not pairs:
            return cls()
        x_mean, y_mean = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
        centred = [(x - x_mean, y - y_mean) for x, y in pairs]
        xy, xx, yy = (math.fsum(values) for values in zip(*((x * y, x * x, y * y) for x, y in centred), strict=True))
        if xx <= TINY or yy <= TINY:
            return cls(xy, xx, yy, int(yy > TINY))
        score = xy / math.sqrt(xx * yy) * math.sqrt(len(pairs) - 1)
        return cls(xy, xx, yy, groups=1, scores=score, compared=1)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.xy + other.xy,
            self.xx + other.xx,
            self.yy + other.yy,
            self.groups + other.groups,
            self.scores + other.scores,
            self.compared + other.compared,
        )

    @property
    def z(self) -> float:
        """How far r is from 0, in standard deviations of chance. All groups weigh the same, however large their
        spreads are: one group alone has √(n − 1) at most.

        >>> round((Moments.of([(1, 1), (2, 2)]) + Moments.of([(1, 5), (2, 90)])).z, 3)      # (1 + 1) / √2
        1.414
        """
        return self.scores / math.sqrt(self.compared) if self.compared else 0.0

    @property
    def r(self) -> float | None:
        """Pearson's r inside groups; None where one of the two does not differ.

        >>> (Moments.of([(1, 1), (2, 2)]) + Moments.of([(5, 8), (7, 6)])).r       # xy 1/2 - 2, xx 1/2 + 2, yy 1/2 + 2
        -0.6
        """
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > TINY and self.yy > TINY else None


SCORE = "score"  # the name of the marks that are the sum of all rewards
SUSPECTS = ("length", "repetition", "copied")
FEATURES = (*SUSPECTS, "correct", "formed")


@dataclass(frozen=True)
class Step:
    """What one step says of one reward. `best` counts completions with its best mark, `top`: all, and the wrong
    ones."""

    moments: Mapping[str, Moments]
    best: int
    wrong: int
    formed_best: int
    formed: int
    top: float = 0.0


def look(groups: Sequence[Sequence[Watched]], reward: str) -> Step:
    """The moments of a reward's marks with each feature, and how it pays for the form alone."""
    moments = dict.fromkeys(FEATURES, Moments())
    marked = [[(seen, mark) for seen in group if (mark := seen.mark(reward)) is not None] for group in groups]
    for group in marked:
        for name in FEATURES:
            pairs = [(float(value), mark) for seen, mark in group if (value := getattr(seen, name)) is not None]
            moments[name] += Moments.of(pairs)
    flat = [pair for group in marked for pair in group]
    top = max((mark for _, mark in flat), default=-math.inf)
    best = [seen for seen, mark in flat if mark >= top - SAME and seen.correct is not None]
    formed = [mark for seen, mark in flat if seen.formed and seen.correct is not None]
    wrong, formed_best = sum(seen.correct == 0 for seen in best), sum(mark >= top - SAME for mark in formed)
    return Step(moments, len(best), wrong, formed_best, len(formed), top)


def values_of(steps: Sequence[Step], least_groups: int = LEAST_GROUPS) -> dict[str, float]:
    """The value of each kind over these steps of a reward; what cannot be told is left out. A correlation needs
    `least_groups` with different marks."""
    values: dict[str, float] = {}
    for name, total in _totals(steps).items():
        if total.groups >= least_groups and (r := total.r) is not None:
            values[name] = r
    # A step in which nobody got the best mark of the others has no best completions.
    top = max((step.top for step in steps), default=0.0)
    at_top = [step for step in steps if step.top >= top - SAME]
    best, formed = sum(step.best for step in at_top), sum(step.formed for step in steps)
    if best and formed and sum(step.formed_best for step in at_top) >= NEARLY_ALL * formed:
        values["format"] = sum(step.wrong for step in at_top) / best
    return values


def _totals(steps: Sequence[Step]) -> dict[str, Moments]:
    return {name: sum((step.moments[name] for step in steps), Moments()) for name in FEATURES}


def believed(steps: Sequence[Step], of_parts: bool = False) -> dict[str, float]:
    """The values over these steps from which an alarm may follow: correlations that chance does not make.

    `of_parts`: it is the score of several rewards, of which one may pay for length or form on purpose. Of this nothing
    follows before some answer is right, since the others are all that differs until then.
    """
    totals = _totals(steps)
    # A policy that nearly always has the form differs by it in few groups: z tells whether they are enough.
    compared_by = {name: r for name in ("correct", "formed") if (r := totals[name].r) is not None}
    values = values_of(steps) | compared_by
    if of_parts and totals["correct"].groups and "correct" not in values:
        return {}
    by_chance = {name for name in (*SUSPECTS, "formed") if abs(totals[name].z) < LEAST_Z}
    return compared({name: value for name, value in values.items() if name not in by_chance})


def compared(values: Mapping[str, float]) -> dict[str, float]:
    """Leaves out the value of `format` where there is nothing to compare. That a reward pays for the form is known
    where completions of another form got less, and where right answers got no more than wrong ones.

    >>> compared({"format": 1.0}), compared({"format": 0.3, "formed": 0.9, "correct": 0.2})
    ({}, {'format': 0.3, 'formed': 0.9, 'correct': 0.2})
    """
    pays_by_form = values.get("formed", 0.0) > max(values.get("correct", 0.0), 0.0)
    is_told = pays_by_form and values.get("format", 1.0) < 1.0
    return {name: value for name, value in values.items() if name != "format" or is_told}


def judged(values: Mapping[str, float]) -> str | None:
    """The kind of alarm that these values of a reward mean, or None: of the features beyond their limits the one that
    goes with the marks best, and better than being right does.

    >>> judged({"length": 0.9, "repetition": 0.6, "correct": 0.2}), judged({"length": 0.9, "correct": 0.95})
    ('length', None)
    """
    strength = {name: abs(values[name]) if name == "length" else values[name] for name in SUSPECTS if name in values}
    if strength:
        name = max(strength, key=lambda name: strength[name])
        if strength[name] >= LIMITS[name] and strength[name] > values.get("correct", 0.0):
            return name
    return "format" if values.get("format", 0.0) >= LIMITS["format"] else None


def identical(groups: Sequence[Sequence[Watched]]) -> float:
    """The share of completions whose text another prompt got, too."""
    prompts: dict[Hashable, set[str]] = {}
    for seen in (seen for group in groups for seen in group):
        prompts.setdefault(_written(seen), set()).add(seen.prompt_id)
    texts = [len(prompts[_written(seen)]) > 1 for group in groups for seen in group]
    return sum(texts) / max(len(texts), 1)


def _written(seen: Watched) -> Hashable:
    """All that the policy wrote: episodes of different actions may end with the same words."""
    return seen.text.strip() if seen.sampled is None else seen.sampled


def earned(groups: Sequence[Sequence[Watched]], reward: str) -> float:
    """The share of completions whose text is paid whatever the question is.

    Nearly all questions that got the text paid for it, and their gold answers differ: a "yes" that is right for many
    questions is honest. It is paid where most completions with this text got more than the lowest marks of the step.
    """
    seen_and_marks = [(seen, mark) for group in groups for seen in group if (mark := seen.mark(reward)) is not None]
    if not seen_and_marks:
        return 0.0
    marks = sorted(mark for _, mark in seen_and_marks)
    low = marks[int(LOW * len(marks))] + SAME
    paid: dict[Hashable, dict[str, list[bool]]] = {}  # by text and prompt
    golds: dict[str, str] = {}
    for seen, mark in seen_and_marks:
        paid.setdefault(_written(seen), {}).setdefault(seen.prompt_id, []).append(mark > low)
        golds[seen.prompt_id] = seen.prompt_id if seen.gold is None else seen.gold
    alike = 0
    for prompts in paid.values():
        paying = [prompt for prompt, payments in prompts.items() if _mean(payments) > 0.5]
        differ = len({golds[prompt] for prompt in paying}) > 1
        if differ and len(paying) >= NEARLY_ALL * len(prompts):
            alike += sum(map(len, prompts.values()))
    return alike / sum(map(len, groups))


class Alarms:
    """Watches the steps of a run. Every alarm is given once; after a resume the window is empty, and it may come again.

    `rewards` are the names of the marks to watch.
    """

    def __init__(self, rewards: Sequence[str]) -> None:
        self.steps: dict[str, deque[Step]] = {name: deque(maxlen=WINDOW) for name in rewards}
        self.shares: deque[float] = deque(maxlen=WINDOW)
        self.earlier: set[tuple[str, str]] = set()
        self.values: dict[str, float] = {}
        self._means: list[float] = []  # of the first reward, by step
        self._evaluations: list[tuple[int, float]] = []  # how many means there were, and the accuracy

    def observe(self, groups: Sequence[Sequence[Watched]]) -> list[Finding]:
        """The alarms of a step, over the window. `values` are then those of the step alone, by metric."""
        self.values = {}
        alarms: list[Finding] = []
        first = next(iter(self.steps))
        self.shares.append(earned(groups, first))
        for name, steps in self.steps.items():
            steps.append(look(groups, name))
            values = believed(steps, of_parts=name == SCORE and len(self.steps) > 1)
            self.values |= {f"alarm/{kind}/{name}": value for kind, value in values_of([steps[-1]], 1).items()}
            if len(steps) == WINDOW and (kind := judged(values)):
                alarms += self._sound(kind, name, values[kind], groups)
        self.values["alarm/identical"] = identical(groups)
        share = _mean(self.shares)
        if len(self.shares) == WINDOW and share >= LIMITS["identical"]:
            alarms += self._sound("identical", first, share, groups)
        marks = [mark for group in groups for seen in group if (mark := seen.mark(first)) is not None]
        self._means += [_mean(marks)] if marks else []
        return alarms

    def evaluated(self, accuracy: float, completions: int) -> list[Finding]:
        """The alarm of an evaluation of so many completions: since an earlier one, a window of steps ago or more, the
        reward rose and accuracy fell, both by more than chance."""
        earlier = [(count, last) for count, last in self._evaluations if len(self._means) - count >= WINDOW]
        self._evaluations.append((len(self._means), accuracy))
        if not earlier:
            return []
        count, last = earlier[-1]
        error = math.sqrt(sum(p * (1 - p) for p in (last, accuracy)) / completions)
        fall = (last - accuracy) / max(error, 1e-9)
        if fall < LIMITS["held_out"] or not _rises(self._means[count:]):
            return []
        return self._sound("held_out", next(iter(self.steps)), fall, [])

    def _sound(self, kind: str, reward: str, value: float, groups: Sequence[Sequence[Watched]]) -> list[Finding]:
        if (kind, reward) in self.earlier:
            return []
        self.earlier.add((kind, reward))
        return [alarm(kind, reward, value, _examples(kind, reward, value, groups))]


def _mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values)


def _rises(values: Sequence[float]) -> bool:
    """Whether the values rise by more than chance: the t test of a slope, at 95 %.

    >>> _rises([0.1, 0.2, 0.3, 0.4, 0.5]), _rises([0.0, 0.0, 0.0, 0.0, 1.0])
    (True, False)
    """
    r, degrees = Moments.of(list(enumerate(values))).r or 0.0, len(values) - 2
    return r > 0 and degrees > 0 and r * math.sqrt(degrees) >= student_t(degrees) * math.sqrt(max(1 - r * r, 0.0))


def _examples(kind: str, reward: str, value: float, groups: Sequence[Sequence[Watched]]) -> list[Example]:
    """Completions with high marks, those first that show the feature most, of different prompts."""

    def order(seen: Watched) -> tuple[float, float]:
        feature = getattr(seen, kind) if kind in FEATURES else -(seen.correct or 0.0)
        return (seen.mark(reward) or 0.0, math.copysign(feature, value) if kind == "length" else feature)

    firsts = sorted((max(group, key=order) for group in groups if group), key=order, reverse=True)[:EXAMPLES]
    return [Example(seen.prompt_id, seen.text, seen.mark(reward)) for seen in firsts]

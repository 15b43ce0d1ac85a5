"""Advantages against the rewards of their group: sign, mean, proportion, and what they were divided by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median, pstdev, stdev

from rewards.audit.findings import Rollouts, flatten, is_cut, is_number
from rewards.audit.traces import Trace
from rewards.finding import Finding, found

SMALL = 1e-3
NEAR = 0.02  # of a scale; trainers add 1e-4 or so to a deviation
USUAL = 0.6
DEVIATION = 1e-4  # is added to a deviation, so that none is 0
FEW = 8  # rollouts of a step
ROUNDING = 2 * 2**-23 / DEVIATION  # of a mean in float32, divided by a deviation of 0
WHITE = 0.1  # of a deviation, which trainers take with n or n - 1
NEARLY_ALL = 0.9


def advantages(rollouts: Rollouts) -> Iterator[Finding]:
    """The advantages of a group are its rewards less their mean, times a factor. A run in which most groups are so has
    wrong ones where they are not."""
    groups = [[t for t in group if t.scored and is_number(t.advantage)] for group in rollouts.groups]
    taught = any(trace.advantage for trace in flatten(groups))
    every = groups = [group for group in groups if len(group) > 1 and taught]
    yield from _weigh(groups)
    factors = {index: factor_of(group) for index, group in enumerate(groups)}
    clipped = _clipped(groups, [index for index, factor in factors.items() if factor is None])
    groups = [group for index, group in enumerate(groups) if index not in clipped]
    factors = dict(enumerate(factor for index, factor in factors.items() if index not in clipped))
    spread = [index for index in factors if not _tied(groups[index])]
    regular = [index for index in spread if factors[index] is not None]
    if not spread:
        return
    rewards = "parts' weighted sum" if groups[0][0].form == "trl" else "rewards"
    # Whatever the estimator, the advantages of two different rewards are proportional to them.
    telling = [index for index in spread if len({trace.value for trace in groups[index]}) > 2] or spread
    proportional = [index for index in telling if factors[index] is not None]
    if len(proportional) < len(telling) / 2:  # weights, or another estimator: only the order can be wrong
        yield from _order(groups)
        yield from _baseline(rollouts, every)
        return
    off = [groups[index] for index in factors if factors[index] is None]
    if off and _are_normalized_apart(groups):
        rollouts.figures["advantages"] = "each reward is normalized by itself"
        yield from _order(groups)
        return
    turned = [groups[index] for index in regular if (factors[index] or 0.0) < 0]
    what = f"{len(off)} of {len(groups)} groups have advantages that are not their {rewards} less the mean"
    yield found("advantage-mismatch", what, flatten(off))
    what = f"{len(turned)} of {len(groups)} groups have advantages with the opposite sign"
    yield found("advantage-sign", what, flatten(turned))
    yield from _denominators(rollouts, groups, {index: factors[index] or 0.0 for index in regular})


def _weigh(groups: list[list[Trace]]) -> Iterator[Finding]:
    """Sets the rewards that TRL did not record: the weights of its parts are those that the advantages tell, from
    groups in which two parts differ. They may change between two steps."""
    names = sorted({name for trace in flatten(groups) for name in trace.parts if trace.form == "trl"})
    ratios: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for index, group in enumerate(groups):
        middle = {name: fmean(trace.parts.get(name) or 0.0 for trace in group) for name in names}
        rows = [([(t.parts.get(name) or 0.0) - middle[name] for name in names], t.credit) for t in group]
        varying = [i for i in range(len(names)) if any(abs(row[i]) > 1e-6 for row, _ in rows)]
        if len(varying) != 2 or varying[0] != 0:
            continue
        k = varying[1]
        aa, ab, bb = (sum(r[i] * r[j] for r, _ in rows) for i, j in ((0, 0), (0, k), (k, k)))
        ay, by = (sum(r[i] * y for r, y in rows) for i in (0, k))
        if aa * bb - ab * ab > 1e-6 * aa * bb and abs(ay * bb - by * ab) > 1e-9:
            ratios[names[k]].append((index, (by * aa - ay * ab) / (ay * bb - by * ab)))
    weights: dict[str, float] = {}
    for name, pairs in ratios.items():
        values = [value for _, value in pairs]
        agreeing = [sum(_agree(value, other) for other in values) for value in values]
        weights |= {name: values[agreeing.index(max(agreeing))]} if values else {}
        for place in range(1, len(pairs) if len(pairs) > 2 else 0):
            before, after = values[:place], values[place:]
            alike = all(_agree(part[0], value) for part in (before, after) for value in part)
            if alike and not _agree(before[0], after[0]):
                rest = flatten(groups[pairs[place][0] :])
                what = f"the weight of {name} against {names[0]} changes from {before[0]:.2g} to {after[0]:.2g}"
                yield found("weights-changed", f"{what} at step {rest[0].step}", rest)
    for trace in flatten(groups):
        if trace.form == "trl":
            marks = {name: value for name, value in trace.parts.items() if is_number(value)}
            trace.reward = sum(weights.get(name, 1.0) * (value or 0.0) for name, value in marks.items())


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= 0.05 * max(abs(one), abs(other))


def _tied(group: Sequence[Trace]) -> bool:
    rewards = [trace.value for trace in group]
    return max(rewards) - min(rewards) <= 1e-6 * max(1.0, abs(rewards[0]))


def factor_of(group: Sequence[Trace]) -> float | None:
    """By how much the advantages are more than the rewards less their mean; None where that is no one number. Cut
    rollouts with the advantage 0 do not count: some trainers leave them out."""
    middle = fmean(trace.value for trace in group)
    pairs = [(trace.value - middle, trace.credit) for trace in group if not (is_cut(trace) and not trace.advantage)]
    if _tied(group):
        most = SMALL + ROUNDING * max(abs(trace.value) for trace in group)
        return 0.0 if all(abs(advantage) <= most for _, advantage in pairs) else None
    return _proportion(pairs)


def _proportion(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The number that makes all rewards, less their baseline, their advantages; None where there is none."""
    most = max((abs(advantage) for _, advantage in pairs), default=0.0)
    square = sum(reward * reward for reward, _ in pairs)
    factor = sum(reward * advantage for reward, advantage in pairs) / square if square else 0.0
    off = max((abs(advantage - factor * reward) for reward, advantage in pairs), default=0.0)
    return factor if off <= NEAR * most + 1e-6 and (most > 1e-6 or not pairs) else None


def _are_normalized_apart(groups: list[list[Trace]]) -> bool:
    """GDPO (arXiv 2601.05242): of each reward the mean is taken away, and it is divided by its own deviation, before
    they are added up."""
    fit = []
    for group in groups:
        names = [name for name in group[0].parts if all(is_number(trace.parts.get(name)) for trace in group)]
        added = [0.0] * len(group)
        for name in names:
            values = [trace.parts[name] or 0.0 for trace in group]
            weight = group[0].weights.get(name, 1.0) or 0.0
            deviation = stdev(values)
            for place, value in enumerate(values):
                added[place] += weight * (value - fmean(values)) / (deviation + DEVIATION)
        pairs = [(value, trace.credit) for value, trace in zip(added, group, strict=True)]
        fit.append(len(names) > 1 and (not any(added) or _proportion(pairs) is not None))
    return _nearly_all(fit)


def _clipped(groups: list[list[Trace]], off: Sequence[int]) -> set[int]:
    """Those of the groups `off` whose advantages are rewards less their mean, times a factor, and clipped after that:
    the most extreme advantages are equal in several groups."""
    every = [trace.credit for trace in flatten(groups)]
    low, high = min(every, default=0.0), max(every, default=0.0)
    fitting = {index for index in off if _fits_clipped(groups[index], low, high)}
    return fitting if len(fitting) > 1 else set()


def _fits_clipped(group: Sequence[Trace], low: float, high: float) -> bool:
    middle = fmean(trace.value for trace in group)
    pairs = [(trace.value - middle, trace.credit) for trace in group]
    at_bound = [(reward, advantage) for reward, advantage in pairs if not low < advantage < high]
    free = [(reward, advantage) for reward, advantage in pairs if low < advantage < high]
    if any(reward * advantage <= 0 for reward, advantage in at_bound):
        return False
    least = max((advantage / reward for reward, advantage in at_bound), default=0.0)  # the factor that clips them all
    square = sum(reward * reward for reward, _ in free)
    factor = sum(reward * advantage for reward, advantage in free) / square if square else least
    most = max(abs(advantage) for _, advantage in pairs)
    fits = all(abs(advantage - factor * reward) <= NEAR * most + 1e-6 for reward, advantage in free)
    return bool(at_bound) and fits and factor >= least * (1 - NEAR)


def _denominators(rollouts: Rollouts, groups: list[list[Trace]], factors: dict[int, float]) -> Iterator[Finding]:
    """Tells what most groups were divided by, and names those that were divided by something else."""
    at_step: dict[int | None, list[float]] = {}
    for index, factor in factors.items():
        at_step.setdefault(groups[index][0].step, []).append(factor)
    fitting: dict[int, set[str]] = {}
    for index, factor in factors.items():
        rewards = [trace.value for trace in groups[index]]
        if pstdev(rewards) < 0.01:
            continue  # what is added to the deviation is most of it
        count = len(rewards)
        scales = {
            "nothing": 1.0,
            "nothing, leave one out": count / (count - 1),
            "the group's standard deviation (n - 1)": 1 / stdev(rewards),
            "the group's standard deviation (n)": 1 / pstdev(rewards),
            "the group's mean": 1 / fmean(rewards) if fmean(rewards) else 0.0,
            "one number for the whole step": median(at_step[groups[index][0].step]),
        }
        fitting[index] = {name for name, scale in scales.items() if abs(abs(factor) - abs(scale)) <= NEAR * abs(scale)}
    counts = Counter(name for names in fitting.values() for name in names)
    if not counts:
        return
    name = max(scales, key=counts.__getitem__)  # the first of equals
    count = counts[name]
    rollouts.figures["advantages are divided by"] = f"{name} ({count} of {len(fitting)} groups)"
    other = [groups[index] for index, names in fitting.items() if name not in names]
    if other and count >= USUAL * len(fitting):
        what = f"{len(other)} of {len(fitting)} groups were not divided by {name}, as the others were"
        yield found("denominators-differ", what, flatten(other))


def _order(groups: list[list[Trace]]) -> Iterator[Finding]:
    """Of two rollouts, the one that is better in every part must not have the lower advantage."""
    turned = []
    for group in groups:
        for one in group:
            parts = one.parts or {"reward": one.value}
            for other in group:
                pairs = [(v or 0.0, (other.parts or {"reward": other.value}).get(n) or 0.0) for n, v in parts.items()]
                better = all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
                if better and one.credit < other.credit - SMALL:
                    turned.append(one)
                    break
    if turned:
        yield found(
            "advantage-mismatch", f"{len(turned)} rollouts are better than another, with less advantage", turned
        )


def _baseline(rollouts: Rollouts, groups: list[list[Trace]]) -> Iterator[Finding]:
    """The advantages of a group have the mean 0, or the baseline is one that an estimator takes."""
    off = [g for g in groups if abs(sum(t.credit for t in g)) > 0.05 * sum(abs(t.credit) for t in g)]
    if not off:
        return
    for name, fits in BASELINES.items():
        if fits(groups):
            rollouts.figures["baseline"] = name
            return
    what = f"{len(off)} groups have advantages whose mean is not 0: their baseline is another"
    yield found("advantage-mean", what, flatten(off))


def _is_whitened(groups: list[list[Trace]]) -> bool:
    """REINFORCE++ (arXiv 2501.03262): the advantages of each step have the mean 0 and the deviation 1."""
    steps: dict[int | None, list[float]] = {}
    for group in groups:
        steps.setdefault(group[0].step, []).extend(trace.credit for trace in group)
    fit = [abs(fmean(of)) < NEAR and abs(pstdev(of) - 1) < WHITE for of in steps.values() if len(of) >= FEW]
    return bool(fit) and all(fit)


def _is_weighed_by_length(groups: list[list[Trace]]) -> bool:
    """OPO (arXiv 2505.23585): the baseline is the mean reward weighed by the number of tokens."""
    fit = []
    for group in groups:
        weighed = [len(trace.token_ids) * trace.credit for trace in group]
        fit.append(all(trace.token_ids for trace in group) and abs(sum(weighed)) <= NEAR * sum(map(abs, weighed)))
    return _nearly_all(fit)


def _is_of_one_rollout(groups: list[list[Trace]]) -> bool:
    """ReMax (arXiv 2310.10505): the baseline is the reward of a greedy rollout, another one for each prompt."""
    rewards = {round(trace.value, 4) for trace in flatten(groups)}
    fit, baselines = [], set()
    for group in groups:
        [baseline, *others] = {round(trace.value - trace.credit, 4) for trace in group}
        fit.append(not others and baseline in rewards)
        baselines.add(baseline)
    return _nearly_all(fit) and len(baselines) > 1


def _is_of_the_best(groups: list[list[Trace]]) -> bool:
    """GRPO for pass@k (arXiv 2503.19595): only the best rollout has an advantage."""
    fit = []
    for group in groups:
        best = max(trace.value for trace in group)
        taught = [trace for trace in group if trace.credit]
        fit.append(len(taught) < 2 and all(trace.credit > 0 and trace.value == best for trace in taught))
    return _nearly_all(fit)


def _nearly_all(fit: Sequence[bool]) -> bool:
    return sum(fit) >= NEARLY_ALL * len(fit)


BASELINES: dict[str, Callable[[list[list[Trace]]], bool]] = {
    "the mean of the step, divided by its deviation": _is_whitened,
    "the mean weighed by length": _is_weighed_by_length,
    "the reward of one rollout": _is_of_one_rollout,
    "the second best reward": _is_of_the_best,
}

"""The run as a whole: order of steps, repeated and skipped data, stale policies, evaluation problems, lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from difflib import SequenceMatcher
from statistics import fmean, pstdev

from rewards.audit.findings import Rollouts, flatten, most_common, words
from rewards.audit.traces import Trace
from rewards.data.leakage import is_gsm8k_test_question
from rewards.finding import Finding, found
from rewards.ties import tied

LONG = 40
DRIFT = 2.0
OPERATORS = "+-*/^=<>%×÷"
SAME = 0.95  # of the words of two problems
FEW = 8  # groups; fewer may have no tie by chance
ALIKE = 0.65  # of the words of two problems with the same numbers


def order(rollouts: Rollouts) -> Iterator[Finding]:
    """Steps follow each other in the files and by the clock, with none missing and none twice."""
    pairs = itertools.pairwise((trace.step, trace) for trace in rollouts.trained if trace.step is not None)
    back = [trace for (before, _), (after, trace) in pairs if after < before]
    if back:
        yield found("step-order", f"the steps go back {len(back)} times, first to step {back[0].step}", back)
    steps = list(rollouts.steps)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    usual, share = most_common(gaps)
    missing = [step for step, gap in zip(steps[1:], gaps, strict=True) if gap != usual]
    if missing and share >= 0.8:
        what = f"steps are missing before {', '.join(map(str, missing[:5]))}"
        yield found("missing-steps", what, flatten(rollouts.steps[step][:1] for step in missing))
    times = {step: [t.time for t in rows if t.time] for step, rows in rollouts.steps.items()}
    starts = [(step, min(values)) for step, values in times.items() if values]
    late = [step for (_, before), (step, after) in itertools.pairwise(starts) if after < before]
    if late:
        what = f"step {late[0]} is older by the clock than the step before it ({len(late)} such steps)"
        yield found("clock", what, flatten(rollouts.steps[step][:1] for step in late))
    backwards = [trace for trace in rollouts.traces if _ends_first(trace.columns.get("timing"))]
    yield found("clock", f"{len(backwards)} rollouts end before they start", backwards)


def _ends_first(timing: object) -> bool:
    spans = [timing, *timing.values()] if isinstance(timing, dict) else []
    pairs = [(span.get("start"), span.get("end")) for span in spans if isinstance(span, dict)]
    return any(start and end and end < start for start, end in pairs)


def duplicates(rollouts: Rollouts) -> Iterator[Finding]:
    """Rows that are there twice, and whole steps that repeat an earlier one."""
    size, _ = most_common(map(len, rollouts.groups))
    crowded = set(flatten(group for group in rollouts.groups if len(group) > size))
    seen: dict[object, Trace] = {}
    twice = []
    for trace in rollouts.traces:
        key: object = (
            trace.split,
            trace.step,
            trace.group,
            trace.sample,
            trace.identity,
            trace.prompt,
            trace.completion,
        )
        if trace.identity is None and (trace.group is None or trace.sample is None):
            distinct = len(trace.completion) < LONG or trace not in crowded
            key = trace if distinct else (trace.step, trace.prompt, trace.completion, trace.reward)
        if seen.setdefault(key, trace) is not trace:
            twice.append(trace)
    yield found("duplicate-rows", f"{len(twice)} rows are there twice", twice)
    content = {step: {(t.prompt, t.completion, t.reward) for t in rows} for step, rows in rollouts.steps.items()}
    for step, rows in content.items():
        if _is_certain(rollouts.steps[step]):
            continue
        long = sum(len(text) >= LONG for _, text, _ in rows)
        same = [other for other in content if other < step and len(rows & content[other]) >= max(4, 0.9 * len(rows))]
        if same and long >= len(rows) / 2:
            yield found("repeated-step", f"step {step} repeats the rollouts of step {same[0]}", rollouts.steps[step])
            return


def _is_certain(rows: list[Trace]) -> bool:
    """Whether the policy answers each prompt with one text. It repeats whole steps then when its data begin again."""
    texts: dict[str, list[str]] = {}
    for trace in rows:
        texts.setdefault(trace.prompt, []).append(trace.completion)
    return all(len(said) > 1 and len(set(said)) == 1 for said in texts.values())


def skipped(rollouts: Rollouts) -> Iterator[Finding]:
    """Rows of the data are drawn in order in most steps, and then some are left out. Where no group is tied, those that
    were have been left out on purpose: that is dynamic sampling."""
    rewards = [[trace.value for trace in group] for group in rollouts.groups]
    if len(rewards) >= FEW and not any(map(tied, rewards)):
        return
    numbers: dict[int, Trace] = {}
    for trace in rollouts.trained:
        info = trace.columns.get("extra_info")
        candidates = [trace.columns.get("index"), info.get("index") if isinstance(info, dict) else None]
        if trace.form in ("nemo_gym", "verifiers_results") and str(trace.group).isdigit():
            candidates.append(int(str(trace.group)))
        for value in [value for value in candidates if type(value) is int][:1]:
            numbers.setdefault(value, trace)
    jumps = [(a, b) for a, b in zip(numbers, list(numbers)[1:], strict=False) if b != a + 1]
    if jumps and len(jumps) <= len(numbers) / 10:
        a, b = jumps[0]
        what = f"the data goes from row {a} to row {b}: what is between them was skipped, or seen again"
        yield found("skipped-data", what, [numbers[b] for _, b in jumps])


def stale(rollouts: Rollouts) -> Iterator[Finding]:
    """A version is far older than usual, newer than the newest of the step before, or does not move any more."""
    rows = [trace for trace in rollouts.trained if trace.version is not None]
    if not rows:
        return
    newest = max(trace.version for trace in rows if trace.version is not None)
    lag = {trace: (newest if trace.step is None else trace.step) - (trace.version or 0) for trace in rows}
    lags = sorted(lag.values())
    usual = lags[len(lags) // 2]
    reach = 2 * (lags[len(lags) * 4 // 5] - usual) + 2
    old = [trace for trace in rows if lag[trace] > usual + reach]
    ahead = [trace for trace in rows if lag[trace] < 0]
    rollouts.figures["steps since the policy's version"] = f"{lags[0]} to {lags[-1]}, usually {usual}"
    yield found("stale", f"{len(old)} rollouts are of a policy much older than usual ({usual} steps)", old)
    if ahead and len(ahead) < len(rows) / 2:
        yield found("version-ahead", f"{len(ahead)} rollouts are of a policy that did not exist yet", ahead)
    latest: dict[int, int] = {}
    for trace in rows:
        if trace.step is not None:
            latest[trace.step] = max(trace.version or 0, latest.get(trace.step, 0))
    stuck = [step for step in latest if {latest.get(step - back) for back in range(4)} == {latest[step]}]
    if stuck and not old and len(set(latest.values())) > 1:
        what = f"the policy's version does not move from step {stuck[0] - 3} on: new weights do not arrive"
        yield found("stale", what, rollouts.steps[stuck[0]])


def leakage(rollouts: Rollouts) -> Iterator[Finding]:
    """Problems of the evaluation were trained on, as they are or under other names."""
    parts = [[trace for trace in rollouts.traces if (trace.split == "train") == training] for training in (True, False)]
    trained, held_out = map(_problems, parts)
    tests = [trace for text, trace in trained if is_gsm8k_test_question([" ".join(text)])]
    yield found("leakage", f"{len(tests)} problems of GSM8K's test set were trained on", tests)
    problems: dict[str, list[tuple[list[str], Trace]]] = {}
    for text, trace in trained:
        for sign in _signs(text):
            problems.setdefault(sign, []).append((text, trace))
    leaks: dict[str, Trace] = {}
    prompts = set()
    for text, trace in held_out:
        near = [pair for sign in _signs(text) for pair in problems.get(sign, [])]
        same = {row.prompt for other, row in near if _alike(text, other)}
        leaks |= {trace.prompt: trace} if same else {}
        prompts |= same
    if leaks:
        count = len({trace.prompt for _, trace in held_out})
        what = f"{len(leaks)} of {count} problems of the evaluation were trained on, or are nearly the same"
        rows = [trace for trace in rollouts.trained if trace.prompt in prompts]
        yield found("leakage", f"{what}: {next(iter(leaks))[-80:]!r}", [*rows, *leaks.values()])


def _problems(traces: list[Trace]) -> list[tuple[list[str], Trace]]:
    """The words of each prompt, and again without those that all begin and end with: a system prompt is no problem."""
    prompts = {trace.prompt: trace for trace in traces}
    texts = [[word for word in words(prompt) if word[0].isalnum() or word in OPERATORS] for prompt in prompts]
    least = min(map(len, texts), default=0) - 1
    start = next((i for i in range(least) if len({text[i] for text in texts}) > 1), 0)
    end = next((i for i in range(least - start) if len({text[-1 - i] for text in texts}) > 1), 0)
    rows = list(zip(texts, prompts.values(), strict=True))
    has_frame = len(texts) > 2 and start + end > 0
    return rows + ([(text[start : len(text) - end], trace) for text, trace in rows] if has_frame else [])


def _numbers(text: list[str]) -> str:
    return " ".join(word for word in text if word.isdigit() or word in OPERATORS)


def _signs(text: list[str]) -> list[str]:
    """What two problems share if they are one: their numbers, or with fewer than two numbers their beginning or end."""
    numbers = _numbers(text)
    return [numbers] if " " in numbers else [" ".join([numbers, *part]) for part in (text[:5], text[-5:])]


def _alike(one: list[str], other: list[str]) -> bool:
    """Returns whether two problems with the same numbers are one. With two numbers or more, names may differ."""
    least = ALIKE if " " in _numbers(one) else SAME
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.real_quick_ratio() >= least and matcher.quick_ratio() >= least and matcher.ratio() >= least


def drift(rollouts: Rollouts) -> Iterator[Finding]:
    """Completions become much longer or shorter, and the reward does not become better."""
    steps = [rows for rows in rollouts.steps.values() if rows]
    if len(steps) < 6:
        return
    third = len(steps) // 3
    first, last = (fmean(fmean(t.length for t in rows) for rows in part) for part in (steps[:third], steps[-third:]))
    unit = "tokens" if steps[0][0].token_ids else "characters"
    rollouts.figures["length"] = f"{first:.0f} to {last:.0f} {unit}"
    before, after = ([t.value for t in flatten(part)] for part in (steps[:third], steps[-third:]))
    noise = pstdev([*before, *after]) * (1 / len(before) + 1 / len(after)) ** 0.5
    better = fmean(after) - fmean(before) > 3 * noise
    if max(first, last) > DRIFT * max(min(first, last), 1.0) and not better:
        what = f"completions go from {first:.0f} to {last:.0f} {unit}, and the reward does not become better"
        yield found("length-drift", what, [*steps[0][:2], *steps[-1][:2]])

"""`quartet audit`: everything that can be found in recorded rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from rewards.audit.detectors import DETECTORS
from rewards.audit.findings import ANSWERS, Rollouts, flatten, is_number
from rewards.audit.options import AuditConfig
from rewards.audit.traces import Trace, groups_of, read_traces, recorded_means, text_of
from rewards.finding import Finding, Report, found
from rewards.isolation.child import plain
from rewards.registry import CHAT
from rewards.scorer import RewardSpec, Scorer

NEAR = 1e-6
FEW = 64  # rollouts after which a reward that never varies is suspicious
ABSENT = object()
# What a source may lack: whether a rollout has it, and which findings need it.
NEEDED: dict[str, tuple[Callable[[Trace], bool], list[str]]] = {
    "advantages": (
        lambda trace: trace.advantage is not None,
        ["advantage-mismatch", "advantage-sign", "advantage-mean", "denominators-differ", "unscored-counts"],
    ),
    "token ids": (lambda trace: bool(trace.token_ids), ["misaligned", "round-trip"]),
    "log-probabilities": (lambda trace: bool(trace.logprobs), ["bad-logprobs", "two-temperatures"]),
    "finish reasons": (lambda trace: trace.finish_reason is not None, ["cut-as-finished"]),
    "steps": (lambda trace: trace.step is not None, ["step-order", "missing-steps", "repeated-step", "length-drift"]),
    "policy versions": (lambda trace: trace.version is not None, ["stale", "version-ahead"]),
    "loss denominators": (
        lambda trace: trace.loss_denominator is not None,
        ["denominator", "masked-in-denominator"],
    ),
}


def audit(
    path: Path,
    config: AuditConfig,
    functions: Sequence[str] = (),
    evaluation: Path | None = None,
    tokenizer: Path | None = None,
) -> Report:
    """Audits the rollouts of a file or folder. With `functions`, they are scored again, in processes of their own."""
    traces = read_traces(path)
    own = len(traces)
    if evaluation is not None:
        traces += read_traces(evaluation, "evaluation")
    rollouts = Rollouts(traces, None if tokenizer is None else _decoder(tokenizer), recorded_means(path), own)
    findings = [finding for detector in DETECTORS for finding in detector(rollouts)]
    for function in functions:
        findings += rescored(rollouts, function, config, alone=len(functions) == 1)
    findings = [finding for finding in findings if finding.where and finding.kind not in config.ignore]
    forms = ", ".join(sorted({trace.form for trace in traces}))
    title = f"{len(rollouts.trained)} rollouts of the form {forms}"
    return Report(title, findings, dict(rollouts.figures), lacking=lacking(rollouts.trained))


def lacking(traces: Sequence[Trace]) -> dict[str, list[str]]:
    """What none of the rollouts has, and the kinds of findings that need it."""
    return {what: kinds for what, (has, kinds) in NEEDED.items() if traces and not any(map(has, traces))}


def _decoder(path: Path) -> Callable[[list[int]], str]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("ids are compared with their text by tokenizers: pip install tokenizers") from error
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of the Rust library, which names no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def rescored(rollouts: Rollouts, function: str, config: AuditConfig, alone: bool = True) -> Iterator[Finding]:
    """Scores the rollouts twice: a reward that differs from the record, or from itself, is a fault, and so is one that
    cannot be computed. Where nothing was recorded under the function's name, the one that is given `alone` is the
    reward."""
    of_messages = any(trace.form == "trl" and trace.turns for trace in rollouts.traces)
    if of_messages and ":" in function and not function.startswith(CHAT):
        function = f"{CHAT}{function}"  # as TRL calls it
    spec = RewardSpec(function, arguments=config.arguments)
    groups = groups_of(trace for trace in rollouts.traces if trace.form != "problems")
    every = flatten(groups)
    columns = {trace: _columns(trace) for trace in every}
    names = sorted({name for row in columns.values() for name in row})
    has_ids = all(trace.token_ids for trace in every)
    settings = config.reward
    with Scorer(
        [spec],
        on_error="drop_sample",
        timeout_s=settings.timeout_s,
        columns=names,
        pass_variables=settings.pass_variables,
    ) as scorer:
        first, second = (
            scorer.score(
                [group[0].prompt for group in groups],
                [[_answer(trace) for trace in group] for group in groups],
                [{}] * len(groups),
                prompt_ids=[group[0].key for group in groups],
                completion_ids=[[trace.token_ids for trace in group] for group in groups] if has_ids else None,
                completion_columns=[
                    {name: [columns[trace].get(name) for trace in group] for name in names} for group in groups
                ],
                trainer_state={"global_step": 0, "max_steps": 1, "epoch": 0.0},
                messages=[group[0].messages or None for group in groups],
                turns=[
                    [trace.turns for trace in group] if spec.reads_chat and group[0].turns else None for group in groups
                ],
            )
            for _ in range(2)
        )
    one, two = ([reward for score in scores for reward in score.rewards] for scores in (first, second))
    messages = {(e.prompt_id, e.sample_index): str(e) for score in first for e in score.errors}
    failures = [t for group in groups for i, t in enumerate(group) if (group[0].key, i) in messages]
    if failures:
        what = f"{spec.label} fails on {len(failures)} rollouts: {next(iter(messages.values())):.160}"
        yield found("reward-fails", what, failures)
    unstable = [trace for trace, a, b in zip(every, one, two, strict=True) if _differs(a, b)]
    if unstable:
        yield found("nondeterministic", f"{spec.label} scores {len(unstable)} rollouts differently twice", unstable)
    excluded = {*failures, *unstable}
    if len(every) >= FEW and len(set(one)) == 1 and is_number(one[0]):
        yield found("always-same", f"{spec.label} always gives {one[0]:g}: it never ran, or never matches", every)
    pairs = [(trace, _recorded(trace, spec.label, alone), mark) for trace, mark in zip(every, one, strict=True)]
    pairs = [pair for pair in pairs if pair[0] not in excluded and pair[1] is not ABSENT]
    other = [(trace, old, new) for trace, old, new in pairs if _differs(old, new)]
    if other:
        _, old, new = other[0]
        what = f"{len(other)} rewards differ from what {spec.label} gives: {old}, now {new}"
        if all(old and new and not _differs(old, -new) for _, old, new in other):
            what += "; they have the opposite sign"
        elif _is_shifted(pairs):
            what += "; they are those of a neighbouring row"
        yield found("scored-otherwise", what, [trace for trace, _, _ in other])


def _columns(trace: Trace) -> dict[str, Any]:
    """The columns, with the answer by the name that rewards ask for. Dates and bytes of parquet files are text, since
    the function runs in a process of its own."""
    columns: dict[str, Any] = json.loads(json.dumps(trace.columns, default=plain))
    answer = next((columns[name] for name in ANSWERS if name in columns), None)
    return columns if answer is None else {"answer": answer} | columns


def _answer(trace: Trace) -> str:
    """The text that is judged: of several turns the last that the policy wrote."""
    return text_of([turn for turn in trace.turns if turn.get("role") == "assistant"][-1:]) or trace.completion


def _recorded(trace: Trace, label: str, alone: bool) -> Any:
    if label in trace.parts:
        return trace.parts[label]
    value = trace.columns.get(label)
    return value if isinstance(value, int | float) else trace.reward if alone else ABSENT


def _is_shifted(pairs: list[tuple[Trace, Any, float | None]]) -> bool:
    """Returns whether every recorded value is that of the row before or after, from the first to the last wrong one."""
    pairs = sorted(pairs, key=lambda pair: (pair[0].file, pair[0].row))
    wrong = [index for index, (_, old, new) in enumerate(pairs) if _differs(old, new)]
    inner = range(wrong[0] + 1, wrong[-1])
    return len(wrong) > 2 and any(
        all(not _differs(pairs[index][1], pairs[index + offset][2]) for index in inner) for offset in (-1, 1)
    )


def _differs(one: float | None, other: float | None) -> bool:
    if one is None or other is None or not (isfinite(one) and isfinite(other)):
        return is_number(one) != is_number(other)
    return abs(one - other) > NEAR * max(1.0, abs(one))

"""Does a reward do what it should? It is tried on gold, empty, wrong and hostile completions, without a model."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation, fmean, quantiles
from typing import Any

from rewards.commands.options import RewardTestConfig, TriedScoringOptions
from rewards.commands.probes import BARE, KINDS, Probe, is_bare, probes
from rewards.data.examples import Example, load_examples
from rewards.finding import Report
from rewards.group_score import RewardFailed, RewardFailure
from rewards.protocol import RewardError
from rewards.registry import find_reward
from rewards.scorer import BATCH, RewardSpec, Scorer
from rewards.verdicts import Verdicts, reaches

MOST_SINGLE = 100  # gold solutions, and other completions, that are scored one by one at most
SINGLE_S = 10.0  # and for how long at most
ROUNDING = 1e-5  # of a model that scores a batch at once
STRONG = 0.5  # a correlation with length that is worth a look
STATE = {"global_step": 0, "max_steps": 1, "epoch": 0.0}

# What a kind of completion is called that is not scored as expected, by what is expected.
FOUND = {
    "full": ("gold-refused", "miss full marks"),
    "less": ("wrong-accepted", "get full marks"),
    "same": ("form-refused", "score not as it does"),
    "odd": ("odd-accepted", "get full marks"),
}
Scores = list[list[float | None]]  # [row][probe]


@dataclass(frozen=True)
class KindResult:
    """One kind of completion scored so. `full` counts full marks, `unexpected` those that are not as expected."""

    kind: str
    count: int
    mean: float | None
    low: float | None
    high: float | None
    full: int
    abstained: int
    unexpected: int

    def as_row(self, due: str) -> dict[str, Any]:
        """The row of the table; `due` is what was expected."""
        low, high = ("-" if mark is None else f"{mark:.3f}" for mark in (self.low, self.high))
        return {
            "completion": KINDS[self.kind].meaning,
            "mean": self.mean,
            "range": low if low == high else f"{low}..{high}",
            "full": f"{self.full}/{self.count}",
            "due": f"{due}, {self.unexpected} not" if self.unexpected else due,
        }


@dataclass(frozen=True)
class Case:
    """A completion that was tried, with its score."""

    place: str  # the id of its row
    prompt: str
    kind: str
    score: float | None
    expected: str
    completion: str

    def as_row(self) -> dict[str, Any]:
        names = ("kind", "score", "expected", "prompt", "completion")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class RewardCheck(Report):
    """What `check_reward` found.

    `differing`: completions that scored differently when scored again, in this process, in another order, or alone (a
    part of them is scored so). `latency_ms`: a gold solution alone, isolation included. `length_correlation`: Pearson's
    r of score and length in characters, over gold solutions, and over gold, wrong and other ones; None where either is
    constant. `logged`: the sums of the numbers that the function logged for each completion when it scored all of them
    for the first time, and `failures` those of that time.
    """

    function: str
    sha256: str | None
    data: str
    rows: int
    max_score: float
    shaping: bool = False
    kinds: list[KindResult] = field(default_factory=list)
    differing: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    completions_per_second: float = 0.0
    length_correlation: dict[str, float | None] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    no_accuracy: str | None = None  # why an evaluation with it reports none

    def tell(self) -> None:
        """Says what was measured, in facts and a table."""
        due = {"full": "full", "less": "less", "same": "as gold", "odd": "less"}
        if self.shaping:
            due = dict.fromkeys(due, "any")
        rows = [kind.as_row(due[KINDS[kind.kind].expected]) for kind in self.kinds if kind.count]
        self.tables = {"what completions score": rows}
        one = ", ".join(f"{name} {value:.2f}" for name, value in self.latency_ms.items())
        self.facts = {
            "determinism": ", ".join(
                f"{name}: {f'{count} differ' if count else 'the same'}" for name, count in self.differing.items()
            ),
            "latency": f"one completion, ms: {one}; in batches {self.completions_per_second:,.0f} a second",
            "correlation with length": ", ".join(
                f"{name}: {'the score is constant' if r is None else f'{r:+.2f}'}"
                for name, r in self.length_correlation.items()
            ),
            "evaluation": self.no_accuracy or "its marks say right or wrong: accuracy is reported",
        }
        if self.logged:
            self.facts["logged in all"] = ", ".join(f"{name} {total:,.10g}" for name, total in self.logged.items())


def check_reward(function: str, config: RewardTestConfig) -> RewardCheck:
    """Tries `function` (a built-in name or `path/to/file.py:function`) on the data of `config`. Raises RewardError,
    with function, row and cause, for one that cannot be loaded or fails."""
    return try_reward(function, config).check


def try_reward(function: str, config: RewardTestConfig) -> Trial:
    """Gives what `check_reward` has found with the completions that it was found on."""
    find_reward(function)  # a misspelt name must not cost a download
    data, scoring = config.data, config.reward
    shaping = config.shaping or data.solution_column is None
    examples = load_examples(data.name, data.split, data, purpose="eval", limit=data.limit)
    spec = RewardSpec(function, arguments=config.arguments)
    options: dict[str, Any] = {"columns": list(examples[0].columns), "on_error": scoring.on_error}
    with Scorer([spec], timeout_s=scoring.timeout_s, pass_variables=scoring.pass_variables, **options) as scorer:
        trial = Trial(spec, scoring, examples, config.template)
        verdicts = Verdicts(spec.label, scorer.right_at(spec.label), trial.dry_run(scorer))
        max_score = verdicts.max_score if config.max_score is None else config.max_score
        sha256 = scorer.describe()[0]["sha256"]
        trial.check = check = RewardCheck(
            f"reward {function}{f', SHA-256 {sha256[:12]}' if sha256 else ''}, on {len(examples)} rows of {data.name}; "
            f"full marks: {max_score:g}",
            function=function,
            sha256=sha256,
            data=data.name,
            rows=len(examples),
            max_score=max_score,
            shaping=shaping,
        )
        started = time.perf_counter()
        trial.scores = trial.score(scorer)
        check.completions_per_second = sum(map(len, trial.scores)) / (time.perf_counter() - started)
        check.logged, check.failures = trial.logged, trial.failures
        others = {"scored again": trial.score(scorer)}
        with (
            contextlib.redirect_stdout(sys.stderr),  # where a worker's prints go
            Scorer([spec], isolated=False, **options) as here,
        ):
            others["in this process"] = trial.score(here)
        others["among other completions"] = trial.score(scorer, backwards=True)
        for name, scores in others.items():
            trial.compare(name, by_place(scores))
        trial.score_alone(scorer)
        for row in trial.scores:
            verdicts.see(row)
        check.no_accuracy = verdicts.note
        if scorer.asks_for("completion_ids"):
            check.add("ids-made-up", "completion_ids were made up: the bytes of the text, one token each")
    trial.judge()
    trial.weigh()
    check.tell()
    return trial


class Trial:
    """Scores the probes of all examples, and tells the `check` what these `scores` say."""

    check: RewardCheck
    scores: Scores

    def __init__(
        self, spec: RewardSpec, scoring: TriedScoringOptions, examples: Sequence[Example], template: str = BARE
    ) -> None:
        self.spec, self.scoring, self.examples = spec, scoring, examples
        self.row_of = {example.example_id: i for i, example in enumerate(examples)}
        self.prompts = [f"{example.question}\n" for example in examples]
        self.messages = [e.messages or [{"role": "user", "content": e.question}] for e in examples]
        self.probes: list[list[Probe]] = probes(examples, template)
        self.logged: dict[str, float] = {}  # of the last scoring of all
        self.failures: list[str] = []

    def score(self, scorer: Scorer, *, backwards: bool = False) -> Scores:
        """Returns the scores of all probes; `backwards` puts every completion into another place of the batch."""
        step = -1 if backwards else 1
        order = range(len(self.examples))[::step]
        groups = self._score(scorer, order, [self.probes[i][::step] for i in order])
        return [rewards[::step] for rewards in groups][::step]

    def _score(self, scorer: Scorer, rows: Sequence[int], chosen: list[list[Probe]]) -> Scores:
        texts = [[probe.text for probe in row] for row in chosen]
        ids = [[list(text.encode(errors="replace")) for text in row] for row in texts]
        try:
            groups = scorer.score(
                [self.prompts[i] for i in rows],
                texts,
                [self.examples[i].columns for i in rows],
                prompt_ids=[self.examples[i].example_id for i in rows],
                completion_ids=ids if scorer.asks_for("completion_ids") else None,
                trainer_state=STATE,
                messages=[self.messages[i] for i in rows],
            )
        except RewardFailed as error:
            i = self.row_of[error.failure.prompt_id]
            raise self._failed(error.failure, i, chosen[list(rows).index(i)][error.failure.sample_index]) from None
        self.failures = [str(failure) for group in groups for failure in group.errors]
        logged: dict[str, list[Any]] = {}
        for group in groups:
            for name, values in group.extras.items():
                logged[name] = logged.get(name, []) + values
        numbers = {name: v for name, v in logged.items() if all(isinstance(x, int | float | None) for x in v)}
        self.logged = {name: math.fsum(x for x in values if x is not None) for name, values in numbers.items()}
        return [group.rewards for group in groups]

    def dry_run(self, scorer: Scorer) -> float | None:
        """Returns the score of the first gold solution."""
        first = self.examples[0]
        try:
            tried = scorer.dry_run(self.prompts[0], self.probes[0][0].text, first.columns, messages=self.messages[0])
        except RewardFailed as error:
            raise self._failed(error.failure, 0, self.probes[0][0]) from None
        return tried.rewards[0]

    def _failed(self, failure: RewardFailure, i: int, probe: Probe) -> RewardError:
        """Returns the failure by the row of the data and the kind of completion."""
        return RewardError(
            f"reward {self.spec.function!r} fails on row {i + 1} ({self.examples[i].example_id}): {failure.kind}: "
            f"{failure.message}\nThe prompt: {self.examples[i].question[:200]!r}\n"
            f"The completion ({KINDS[probe.kind].meaning}): {probe.text[:200]!r}"
        )

    def compare(self, name: str, others: dict[tuple[int, int], float | None], near: float = 1e-9) -> bool:
        """Notes where the same completions, by row and place, got other scores in another way, and tells whether any
        did."""
        places = [(i, j) for (i, j), other in others.items() if not _equal(self.scores[i][j], other, near)]
        self.check.differing[name] = len(places)
        if places:
            i, j = places[0]
            kind = KINDS[self.probes[i][j].kind].meaning
            self.check.add(
                "nondeterministic",
                f"{len(places)} completions score differently {name}: first on row {i + 1} "
                f"({self.examples[i].example_id}), {kind}: {_words(self.scores[i][j])}, then {_words(others[i, j])}",
                [self.case(i, j, _words(others[i, j])) for i, j in places],
            )
        return bool(places)

    def case(self, i: int, j: int, expected: str) -> Case:
        example, probe = self.examples[i], self.probes[i][j]
        return Case(example.example_id, example.question, probe.kind, self.scores[i][j], expected, probe.text)

    def score_alone(self, scorer: Scorer) -> None:
        """Completions in calls of their own tell how long a gold solution takes, and whether the batch changes a
        score."""
        rows = range(min(len(self.examples), MOST_SINGLE))
        kinds = range(max(map(len, self.probes)) - 1)
        others = dict.fromkeys((i, 1 + (i + j) % (len(self.probes[i]) - 1)) for j in kinds for i in rows)  # all soon
        times, alone = [], {}
        end = time.perf_counter() + SINGLE_S
        for i, j in [*((i, 0) for i in rows), *list(others)[:MOST_SINGLE]]:
            started = time.perf_counter()
            alone[i, j] = self._score(scorer, [i], [[self.probes[i][j]]])[0][0]
            times += [1000 * (time.perf_counter() - started)] if j == 0 else []
            if time.perf_counter() > end:
                break
        self.compare("alone", alone, ROUNDING)
        cuts = quantiles(times * 2, n=100, method="inclusive")  # twice: one value alone has no quantiles
        self.check.latency_ms = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(times)}

    def judge(self) -> None:
        """Compare every score with what its kind should get."""
        check = self.check
        below = f"below {check.max_score:g}"
        due = {"full": f"{check.max_score:g}", "less": below, "same": "as gold", "odd": below}
        for kind, (expected, meaning) in KINDS.items():
            places = [(i, j) for i, row in enumerate(self.probes) for j, probe in enumerate(row) if probe.kind == kind]
            values = [score for i, j in places if (score := self.scores[i][j]) is not None]
            unexpected = [] if check.shaping else [(i, j) for i, j in places if self._is_unexpected(expected, i, j)]
            mean, low, high = fmean(values) if values else None, min(values, default=None), max(values, default=None)
            full = sum(reaches(value, check.max_score) for value in values)
            abstained = len(places) - len(values)
            check.kinds.append(KindResult(kind, len(places), mean, low, high, full, abstained, len(unexpected)))
            if unexpected:
                name, what = FOUND[expected]
                cases = [self.case(i, j, due[expected]) for i, j in unexpected]
                check.add(name, f"{meaning}: {len(unexpected)} of {len(places)} {what}", cases)
        golds = [row[0].text for row in self.probes]
        if check.kinds[0].unexpected == len(golds) and all(map(is_bare, golds)):
            check.add("bare-answers", f"gold solutions are bare answers such as {golds[0]!r}")
        if abstained := sum(kind.abstained for kind in check.kinds) - len(check.failures):
            check.add("abstains", f"{abstained} completions got no score: the function abstained")
        if check.failures:
            check.add("reward-fails", f"{len(check.failures)} completions failed; the first: {check.failures[0]}")
        if not check.shaping and not any(probe.kind in ("wrong", "other") for row in self.probes for probe in row):
            check.add("nothing-wrong", "no wrong completion could be made: all gold answers say the same")

    def _is_unexpected(self, expected: str, i: int, j: int) -> bool:
        score = self.scores[i][j]
        full = score is not None and reaches(score, self.check.max_score)
        return {"full": not full, "less": full, "odd": full, "same": not _equal(score, self.scores[i][0])}[expected]

    def weigh(self) -> None:
        """Notes the correlation with length, and the time against the limit."""
        check = self.check
        for name, kinds in {"gold": ("gold",), "gold, wrong and other": ("gold", "wrong", "other")}.items():
            pairs: list[tuple[float, Any]] = [
                (float(len(probe.text)), score)
                for row, values in zip(self.probes, self.scores, strict=True)
                for probe, score in zip(row, values, strict=True)
                if probe.kind in kinds and score is not None
            ]
            r = None
            with contextlib.suppress(StatisticsError, TypeError):  # constant, or fewer than two
                r = correlation(*zip(*pairs, strict=True))
            check.length_correlation[name] = r
            if r is not None and abs(r) >= STRONG:
                more = "more" if r > 0 else "less"
                check.add("length-scored", f"longer completions score {more}: r = {r:+.2f} with length ({name})")
        seconds = BATCH / check.completions_per_second
        if seconds > self.scoring.timeout_s / 2:
            limit = f"{self.scoring.timeout_s:g} s that reward.timeout_s allows"
            check.add("slow-reward", f"a batch of {BATCH} completions takes about {seconds:.1f} s of the {limit}")


def by_place(scores: Scores) -> dict[tuple[int, int], float | None]:
    return {(i, j): score for i, row in enumerate(scores) for j, score in enumerate(row)}


def _equal(one: float | None, other: float | None, near: float = 1e-9) -> bool:
    return one == other or (None not in (one, other) and math.isclose(one or 0.0, other or 0.0, rel_tol=near))


def _words(score: float | None) -> str:
    return "abstained" if score is None else f"{score:g}"

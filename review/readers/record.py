"""What a run folder says of the run, as the detectors look at it: options, curves, events and groups of completions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from review.readers.gains import Gains, label_of, options_of_run
from review.readers.metric_logs import Log
from review.readers.plain_files import check_files, read_step
from review.readers.run_folder import TURNS, check_run, read_events, read_metrics
from review.statistics.estimates import answer_reader
from rewards.built_in.gsm8k import extract_answer, gold_answer
from rewards.episode import answer_of
from rewards.records import recorded_steps, split_groups

STEPS = 16  # whose rollouts are read: the first, the last, and some between
AUDITED = 2048  # rollouts, so that an answer takes a second
FEW = 8  # groups; of fewer nothing is said
SHAPING = (  # built-in rewards that do not say whether an answer is right
    *("length_penalty", "repetition_penalty", "soft_overlong_punishment"),
    *("regex_format", "tag_format", "gsm8k_format"),
)


@dataclass(frozen=True)
class Group:
    """The completions of one prompt at one step that have a mark. `marks` are those of the first reward, `answers` what
    is read of the texts as the final answer; None where there is none."""

    step: int
    lines: Sequence[dict[str, Any]]
    marks: Sequence[float]
    answers: Sequence[Hashable | None]

    @cached_property
    def majority(self) -> tuple[Hashable | None, float]:
        """The most frequent answer and its share."""
        answer, count = Counter(self.answers).most_common(1)[0]
        return answer, count / len(self.answers)

    @property
    def mark_of_majority(self) -> float:
        """The best mark that the most frequent answer got."""
        return max(mark for mark, answer in zip(self.marks, self.answers, strict=True) if answer == self.majority[0])

    @property
    def marks_of_correct(self) -> list[float]:
        """The marks of completions whose answer is the reference answer, where that is a number."""
        pairs = zip(self.lines, self.marks, strict=True)
        return [mark for line, mark in pairs if is_correct(answer_text(line), line.get("gold"))]

    @property
    def numbered(self) -> list[tuple[dict[str, Any], float]]:
        """The completions with a marked number as answer and a number as reference answer, and their marks."""
        pairs = zip(self.lines, self.marks, strict=True)
        return [(line, mark) for line, mark in pairs if _has_numbers(line)]

    @property
    def majority_is_right(self) -> float:
        """Whether the most frequent answer is the reference answer, or had the best mark if that is no number."""
        lines = [line for line, _ in self.numbered]
        if len(lines) < len(self.lines) / 2:
            return self.mark_of_majority
        pairs = zip(self.lines, self.answers, strict=True)
        most = [line for line, said in pairs if said == self.majority[0]]
        return float(any(is_correct(answer_text(line), line.get("gold")) for line in most))

    @property
    def is_one_text(self) -> bool:
        return len({line["text"] for line in self.lines}) == 1

    def all_have(self, mark: float) -> bool:
        return all(abs(other - mark) < 1e-6 for other in self.marks)


def answer_text(line: Mapping[str, Any]) -> str:
    """What a reward reads of a recorded completion: of an episode the policy's last turn."""
    return answer_of(line["text"], line.get("turns") or [])


def _gold_of(line: Mapping[str, Any]) -> Decimal | None:
    try:
        return None if line.get("gold") is None else gold_answer(line["gold"])
    except (ValueError, TypeError):
        return None


def _has_numbers(line: Mapping[str, Any]) -> bool:
    return _gold_of(line) is not None and extract_answer(answer_text(line)) is not None


def is_correct(text: str, gold: Any) -> bool:
    """Whether the marked answer of a text is the reference answer; no for one that is not a number.

    >>> is_correct("3 + 4 = 7\\n#### 7", "#### 7"), is_correct("#### 7", "yes")
    (True, False)
    """
    try:
        return gold is not None and extract_answer(text) == gold_answer(gold)
    except (ValueError, TypeError):
        return False


def _only_shapes(reward: Mapping[str, Any]) -> bool:
    """Whether a reward is a penalty or a form, or is only recorded: what the run should learn is in another one."""
    return reward.get("function") in SHAPING or reward.get("weight") == 0


class Record:
    """A run of `quartet train`, from its folder. Raises ValueError for a folder that holds no such run."""

    def __init__(self, folder: Path) -> None:
        file = check_run(folder) / "config.yaml"
        check_files(file, folder / "metrics.jsonl", folder / "events.jsonl")
        command, options = options_of_run(folder)
        if command != "train":
            raise ValueError(f"RUN={folder} is a run of quartet {command}; name one of quartet train, which has groups")
        self._read(folder, options, read_metrics(folder), read_events(folder))

    @classmethod
    def of_log(cls, log: Log) -> Record:
        """Curves that another trainer has written, without options, events and rollouts."""
        record = cls.__new__(cls)
        options: dict[str, Any] = {"rewards": [{"function": name, "name": name} for name in log.parts]}
        record._read(log.path, options | ({"steps": log.steps} if log.steps else {}), log.rows, [])
        record.steps = max(row["step"] for row in log.rows)
        return record

    def _read(
        self, folder: Path, options: dict[str, Any], rows: list[dict[str, Any]], events: list[dict[str, Any]]
    ) -> None:
        self.folder, self.options = folder, options  # by dotted key
        self.rows, self.events = rows, events
        self.gains = Gains.of(folder, options, self.rows)
        self.rewards: list[dict[str, Any]] = sorted(self.options.get("rewards") or [{}], key=_only_shapes)
        first = self.rewards[0]
        self.first_reward, self.function = label_of(first), str(first.get("function"))
        self.read_answer = answer_reader(self.function, first.get("arguments") or {})
        self.steps = max((row["step"] for row in self.rows if "completion/tokens" in row), default=0)
        self.faults: list[str] = []  # what is wrong with rollouts that cannot be read
        self.lines: dict[int, list[dict[str, Any]]] = {}  # the rollouts of the steps that were read
        self.groups = [group for group in self._groups() if len(group.marks) > 1]
        half = max(self.steps / 2, min((group.step for group in self.groups), default=0))
        self.early = [group for group in self.groups if group.step <= half]  # with these the run begins
        self.marks = [mark for group in self.groups for mark in group.marks]
        self.top = max([mark for mark in self.marks if mark > 0], default=1.0)  # full marks
        self.start = fmean([mark for group in self.early for mark in group.marks] or [self.top]) / self.top
        # By the gold answers: how the score and being right correlate inside groups; and how many completions with the
        # best mark are wrong, where nearly all well-formed ones have it.
        self.right = median(self.series(*self.watched("correct")) or [0.0])
        wrong = self.series(*self.watched("format"))
        self.wrong_at_best = median(wrong) if wrong else None
        self.learns_by_others = len(self.rewards) > 1 and self.right > 0.5  # parts of the score beside the first
        lengths = {row["step"]: row.get("completion/length_mean") or 1.0 for row in self.rows}
        nats = {row["step"]: row.get("policy/approx_kl") for row in self.rows}  # a token
        self.moves = {step: max(kl, 0.0) * lengths[step] for step, kl in nats.items() if kl is not None}  # a completion

    def _groups(self) -> list[Group]:
        steps, groups = recorded_steps(self.folder), list[Group]()
        places = {round(i * (len(steps) - 1) / (STEPS - 1)) for i in range(STEPS)} if steps else set()
        for step in (steps[index] for index in sorted(places)):
            try:
                self.lines[step] = read_step(self.folder, step)
                groups += [self._group(step, lines) for lines in split_groups(self.lines[step])]
            except (OSError, ValueError) as error:
                self.faults.append(str(error))
        return groups

    @cached_property
    def audited(self) -> dict[int, list[dict[str, Any]]]:
        """Those of `lines` that an audit reads: evenly spaced steps with AUDITED rollouts at most."""
        most = max(1, len(self.lines) * AUDITED // max(AUDITED, sum(map(len, self.lines.values()))))
        return dict(list(self.lines.items())[:: math.ceil(len(self.lines) / most) if self.lines else 1])

    def _group(self, step: int, lines: Sequence[dict[str, Any]]) -> Group:
        marks = [line["parts"].get(self.first_reward, line.get("reward")) for line in lines]
        scored = [(line, float(mark)) for line, mark in zip(lines, marks, strict=True) if mark is not None]
        answers = [self.read_answer(answer_text(line)) for line, _ in scored]
        return Group(step, [line for line, _ in scored], [mark for _, mark in scored], answers)

    @property
    def completions(self) -> float:
        """How many completions the steps had, by those of the recorded groups."""
        lines = sum(map(len, self.lines.values()))
        return lines * max(self.steps, 1) / max(len(self.lines), 1)

    def option(self, key: str) -> str:
        """The option as a sentence names it."""
        return f"{key} (now {self.options[key]})" if key in self.options else key

    def with_values(self, text: str) -> str:
        """The text with the value of each option that it names."""
        return re.sub(r"\b[a-z_]+(?:\.[a-z_]+)+\b", lambda match: self.option(match[0]), text)

    def share(self, groups: Sequence[Group], holds: Callable[[Group], bool]) -> float:
        """The share of the groups of which it holds; 0 of a FEW."""
        return fmean(map(holds, groups)) if len(groups) >= FEW else 0.0

    def series(self, *names: str) -> list[float]:
        """The values of the first of these metrics that was recorded, over the steps."""
        each = ([row[name] for row in self.rows if row.get(name) is not None] for name in names)
        return next(filter(None, each), [])

    def mean(self, name: str) -> float:
        return fmean(self.series(name) or [0.0])

    @property
    def state(self) -> str:
        ends = [event for event in self.events if event["event"] in TURNS]
        how = ends[-1].get("how") if ends else None
        return f"step {self.steps} of {self.options.get('steps')}, {how or 'in progress or killed'}"

    def watched(self, kind: str) -> tuple[str, str]:
        """The metrics of an alarm: of the score, else of the first reward."""
        return f"alarm/{kind}/score", f"alarm/{kind}/{self.first_reward}"

    @property
    def has_rise(self) -> bool:
        """Whether there are steps enough to say how far a rise is from chance: two in a third of them."""
        return len(self._curve) >= 6

    @cached_property
    def _curve(self) -> list[float]:
        """The marks of the first reward by step; of the recorded completions if no step has them."""
        return self.series(f"reward/part/{self.first_reward}", "reward/mean") or self.marks or [0.0]

    @cached_property
    def rise(self) -> tuple[float, float, float]:
        """The mark of the first reward in the first and the last third of the steps, and the difference in standard
        errors."""
        values = self._curve
        third = max(len(values) // 3, 1)
        first, last = values[:third], values[-third:]
        spread = variance(first) + variance(last) if third > 1 else float("inf")
        return fmean(first), fmean(last), (fmean(last) - fmean(first)) / max((spread / third) ** 0.5, 1e-9)

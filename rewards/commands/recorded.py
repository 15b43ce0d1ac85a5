"""Rollouts of other tools as the record of a run, for `reward replay`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.audit.findings import ANSWERS
from rewards.audit.traces import Trace, groups_of, read_traces
from rewards.commands.options import ReplayedDataOptions
from rewards.data.examples import load_examples
from rewards.isolation.child import plain
from rewards.protocol import text_of


class Rollouts:
    """The rollouts in a file or folder. What is recorded without a step is of step 0."""

    def __init__(self, path: Path, data: ReplayedDataOptions) -> None:
        if next(path.glob("*/config.yaml"), None):
            raise FileNotFoundError(f"{path} is no run folder: it has no config.yaml; name one of the runs in it")
        traces = read_traces(path)
        self._steps: dict[int, list[Trace]] = {}
        for trace in traces:
            self._steps.setdefault(trace.step or 0, []).append(trace)
        self.steps = sorted(self._steps)
        self.max_steps = max(self.steps[-1], 1)
        self.has_ids = all(trace.token_ids for trace in traces)
        self._parts = list(dict.fromkeys(name for trace in traces for name in trace.parts))
        self.has_score = len(self._parts) < 2 or any(trace.form != "trl" for trace in traces)
        examples = load_examples(data.name, data.split, data, purpose="eval") if data.name else []
        self._data, self._examples = data, {example.question.strip(): example for example in examples}
        known = next((list(example.columns) for example in self._examples.values()), [])
        recorded = dict.fromkeys(name for trace in traces for name in _columns(trace))
        self._own = [name for name in recorded if name not in known]
        self.columns = [*known, *self._own]

    def groups(self, step: int) -> list[list[dict[str, Any]]]:
        """The lines of each group, as a run of ours has them."""
        return [[self._line(trace, i) for i, trace in enumerate(group)] for group in groups_of(self._steps[step])]

    def _line(self, trace: Trace, place: int) -> dict[str, Any]:
        return {
            "prompt": trace.prompt,
            "prompt_id": trace.group or trace.key,
            "sample": place if trace.sample is None else trace.sample,
            "text": trace.completion,
            "token_ids": trace.token_ids,
            "messages": trace.messages or None,
            "parts": {name: _mark(trace.parts.get(name)) for name in self._parts},
            "reward": _mark(trace.reward),
            "columns": _columns(trace),
            **({"turns": trace.turns} if trace.turns else {}),
        }

    def answer(self, line: Mapping[str, Any]) -> str:
        """The policy's last turn, whose content may be in blocks, or missing beside a call."""
        said = [turn for turn in line.get("turns", ()) if turn.get("role") == "assistant"]
        return text_of(said) if said else line["text"]

    def row(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of the row of the data whose question is in the prompt. Worked examples stand before the question
        that is asked, so that of several the one that ends last counts, and of these the longest."""
        if not self._data.name:
            return {}
        last = text_of(line["messages"] or line["prompt"]).strip()
        questions = [last] if last in self._examples else [q for q in self._examples if q in line["prompt"]]
        if questions:
            ends = {question: line["prompt"].rfind(question) + len(question) for question in questions}
            return self._examples[max(questions, key=lambda question: (ends[question], len(question)))].columns
        raise ValueError(f"no question of the data ({self._data.name}) is in the prompt {line['prompt'][:200]!r}")

    def completion_columns(self, group: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [line["columns"].get(name) for line in group] for name in self._own}


def _columns(trace: Trace) -> dict[str, Any]:
    """What else is recorded. The gold answer has the names by which our rewards and verl's functions ask for it too."""
    columns = json.loads(json.dumps(trace.columns, default=plain))
    gold = next(({"answer": columns[name], "ground_truth": columns[name]} for name in ANSWERS if name in columns), {})
    return gold | columns


def _mark(value: float | None) -> float | None:
    return None if value is None or value != value else value  # NaN: TRL's of a function that abstained

"""What honest runs do is not taken for a fault: sparse rewards, headings, penalties that never fire, clipped advantages
and others. Each was an alarm before. What others record is read whole, and in bounded time and memory."""

from __future__ import annotations

import datetime
import json
import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import zstandard

from rewards.audit import traces as reading
from rewards.audit.audit import audit
from rewards.audit.detectors.tokens import _said
from rewards.audit.options import AuditConfig
from rewards.audit.traces import Trace, groups_of, read_traces
from tests.rewards.audit.rollouts import honest, set_advantages
from tests.rewards.audit.test_detectors import ALL, NO_TOKENS, SIZE, change, found

Habit = Callable[[list[Trace]], list[Trace] | None]


def rewarded(usual: float, rare: float) -> Habit:
    """One rollout in 37 has the rare reward."""

    def plant(traces: list[Trace]) -> None:
        for number, trace in enumerate(traces):
            trace.reward = rare if number % 37 == 5 else usual * (number % 3 > 0)
            trace.parts, trace.weights = {}, {}
        set_advantages(traces, SIZE)

    return plant


def written(text: str) -> Habit:
    return change(*ALL, completion=lambda t: text + t.completion, turns=[], **NO_TOKENS)


def columned(name: str, value: str) -> Habit:
    return change(*ALL, columns=lambda t: t.columns | {name: value})


def never_fires(name: str) -> Habit:
    return change(
        *ALL, form="quartet", parts=lambda t: t.parts | {name: 0.0}, weights=lambda t: t.weights | {name: 1.0}
    )


def written_by_a_few(gold: str, usual: str, rare: str) -> Habit:
    """Every 40th answer has another form."""

    def plant(traces: list[Trace]) -> None:
        for number, trace in enumerate(traces):
            form = rare if number % 40 == 0 else usual
            trace.completion = f"{trace.completion.partition(':')[0]}, so it is {form}."
            trace.columns, trace.turns, trace.reward = {"answer": gold}, [], float(number % 3 > 0 or number % 40 == 0)
            trace.parts, trace.weights, trace.calls = {}, {}, []
            trace.token_ids, trace.logprobs, trace.prompt_ids = [], [], []
        set_advantages(traces, SIZE)

    return plant


def dynamic_sampling(traces: list[Trace]) -> list[Trace]:
    groups = [traces[start : start + SIZE] for start in range(0, len(traces), SIZE)]
    return [trace for group in groups if len({t.reward for t in group}) > 1 for trace in group]


def left_out(traces: list[Trace]) -> list[Trace]:
    stay = [trace for number, trace in enumerate(traces) if number not in (5, 42, 77)]
    for group in groups_of(stay):
        set_advantages(group, len(group))
    return stay


def prompts_twice(traces: list[Trace]) -> None:
    """TRL and verl record no groups, and data may hold a prompt twice."""
    for number, trace in enumerate(traces):
        first = traces[number // SIZE * SIZE]
        group = number // SIZE
        trace.group, trace.sample, trace.identity = None, None, None
        if group % 4 == 3:  # as the second group of its step
            other = traces[(group - 2) * SIZE]
            trace.prompt, trace.messages, trace.columns = other.prompt, other.messages, other.columns
        else:
            trace.columns = {"answer": first.columns["answer"]}
        trace.token_ids, trace.logprobs, trace.calls, trace.prompt_ids = [], [], [], []


def saturated(traces: list[Trace]) -> list[Trace]:
    """From the fifth step on each prompt of a small data set has one text, of probability 1."""
    stay = traces[:64]
    for step in range(5, 9):
        for number, trace in enumerate(traces[:16]):
            first = traces[number // SIZE * SIZE]
            copy = deepcopy(first)
            copy.step, copy.version, copy.time = step, step - 1, 1000.0 + 60 * step
            copy.group, copy.sample, copy.row = f"{step}/{number // SIZE}", trace.sample, len(stay) + 1
            copy.logprobs, copy.calls, copy.advantage = [0.0] * len(copy.token_ids), [], 0.0
            copy.columns = {"answer": first.columns["answer"]}
            stay.append(copy)
    return stay


def clipped(low: float, high: float) -> Habit:
    return change(*ALL, advantage=lambda t: min(high, max(low, t.advantage)))


HEADINGS = ("Understanding", "Setting up", "Finding", "Adding both", "Checking", "Concluding", "Done")
EQUALS = "class Point:\n    def __eq__(self, other):\n        return self.x == other.x\n"
SCRIPT = 'def main():\n    print(1)\nif __name__ == "__main__":\n    main()\n    sys.exit(0)\n'
HABITS: dict[str, Habit] = {
    "sparse rewards": rewarded(0.1, 1.0),
    "sparse rewards of 10": rewarded(1.0, 10.0),
    "a rare penalty": rewarded(0.1, -1.0),
    "headings": written("".join(f"#### {name}\nSome text.\n" for name in HEADINGS)),
    "numbered headings": written("".join(f"#### {n}. Add them\nSome text.\n" for n in range(8))),
    "a class with __eq__": written(EQUALS),
    "a script that exits": written(SCRIPT),
    "an answer that is an exception": columned("expected_output", "ValueError: negative"),
    "a length penalty that never fires": never_fires("length_penalty"),
    "an overlong penalty that never fires": never_fires("overlong"),
    "dynamic sampling": dynamic_sampling,
    "failed samples left out": left_out,
    "a comma of LaTeX": written_by_a_few("1234", "1,234", "1{,}234"),
    "thin blanks of LaTeX": written_by_a_few("1234", "1234", r"1\,234"),
    "a fraction of LaTeX": written_by_a_few("0.5", "1/2", r"\frac{1}{2}"),
    "a prompt twice in a step": prompts_twice,
    "a saturated policy": saturated,
    "advantages clipped on both sides": clipped(-1.0, 1.0),
    "advantages clipped below": clipped(-1.0, 99.0),
    "advantages clipped far in": clipped(-0.5, 0.5),
}


@pytest.mark.parametrize("name", HABITS)
def test_an_honest_habit_is_no_finding(name: str) -> None:
    traces = honest(2)
    assert found(HABITS[name](traces) or traces) == {}


def test_clipping_explains_no_turned_advantages() -> None:
    traces = honest(3)
    clipped(-1.0, 1.0)(traces)
    change(16, None, advantage=lambda t: -t.advantage)(traces)
    assert found(traces)


def test_definitions_that_make_all_equal_are_still_found() -> None:
    traces = honest(2)
    written("class All(int):\n    def __eq__(self, other):\n        return True\n")(traces)
    assert "probe-rewarded" in found(traces)


def trl_rows(is_tied: bool) -> list[dict[str, object]]:
    chance = random.Random(0)
    rows: list[dict[str, object]] = []
    for number in range(20):
        marks = [float(number % 2 if is_tied else chance.random() < 0.5) for _ in range(4)]
        mean = sum(marks) / 4
        for mark in marks:
            text = f"some text {chance.random()}"
            row = {"step": number // 2 + 1, "prompt": f"q{number}", "completion": text, "correct": mark}
            rows.append(row | {"entropy": chance.random() * 10, "advantage": mark - mean})
    return rows


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_number_that_a_trl_reward_logged_is_no_part_of_the_reward(tmp_path: Path, is_tied: bool) -> None:
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in trl_rows(is_tied)))
    traces = read_traces(file)
    assert {trace.value for trace in traces} == {0.0, 1.0}
    assert list(found(traces)) == (["tied-groups"] if is_tied else [])


def compressed(number: int) -> bytes:
    row = {"prompt": "p", "completion": f"c{number}", "reward": 1.0}
    return zstandard.compress(f"{json.dumps(row)}\n".encode())


def test_all_frames_are_read_and_no_more_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(compressed(1) + compressed(2))
    assert [trace.completion for trace in read_traces(file)] == ["c1", "c2"]
    monkeypatch.setattr(reading, "MOST_BYTES", 2**20)
    file.write_bytes(zstandard.compress(b" " * 2**22))
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst would unpack to more than 1 MiB"):
        read_traces(file)


@pytest.mark.parametrize("text", ["<answer>" * 20_000, "<|" + "eot" * 20_000, "#### " + " " * 60_000 + "x"])
def test_a_long_completion_takes_no_quadratic_time(text: str) -> None:
    traces = honest(2)
    change(5, 6, completion=text, turns=[], reward=2.0, **NO_TOKENS)(traces)
    started = time.process_time()
    found(traces)
    assert time.process_time() - started < 2


def test_thoughts_that_never_end_take_no_quadratic_time() -> None:
    started = time.process_time()
    assert _said({"role": "assistant", "content": "<think>a</think> b" + "<think>" * 20_000})[1].startswith("b<think>")
    assert time.process_time() - started < 1


def test_rewards_are_given_dates_of_parquet_files_as_text(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["a?"] * 8, "completion": ["b"] * 8, "reward": [1.0] * 8}
    table = pyarrow.table(columns | {"day": [datetime.date(2024, 1, 2)] * 8})
    parquet.write_table(table, tmp_path / "rollouts.parquet")
    (tmp_path / "mine.py").write_text("def f(completions, day, **_):\n    return [float('2024' in d) for d in day]\n")
    result = audit(tmp_path / "rollouts.parquet", AuditConfig(), [f"{tmp_path / 'mine.py'}:f"])
    assert "reward-fails" not in {finding.kind for finding in result.findings}
    assert "scored-otherwise" not in {finding.kind for finding in result.findings}

"""`quartet audit`: what it prints, writes and ends with, and rewards that are scored again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from rewards import RewardError
from rewards.__main__ import main
from rewards.audit import audit as module
from rewards.audit.audit import audit
from rewards.audit.options import AuditConfig
from rewards.audit.traces import COMMON, Trace
from rewards.commands.printer import page
from rewards.finding import Report, found
from rewards.scorer import Scorer
from tests.rewards.audit.rollouts import honest


def write(path: Path, traces: list[Trace]) -> Path:
    rows = [asdict(trace) for trace in traces]
    names = set(COMMON) - {"rewards"}
    lines = [
        {**{name: row[name] for name in names}, "rewards": row["parts"], "turns": None, **row["columns"]}
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_exit_codes_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = honest()
    file = write(tmp_path / "mine.jsonl", traces)
    assert main(["audit", str(file)]) == 0
    assert "Nothing was found." in capsys.readouterr().out
    traces[5].error, traces[5].completion = "TimeoutError: 10 s", "<script>alert(1)</script>"
    write(file, traces)
    outputs = tmp_path / "found.json", tmp_path / "found.html"
    assert main(["audit", str(file), "--json", str(outputs[0]), "--html", str(outputs[1])]) == 1
    assert "mine.jsonl:6" in capsys.readouterr().out
    written = json.loads(outputs[0].read_text())
    kinds = {finding["kind"]: finding["where"] for finding in written["findings"]}
    assert [(row["place"], row["step"], row["group"]) for row in kinds["failure-as-number"]] == [
        ("mine.jsonl:6", 1, "g1")
    ]
    html = outputs[1].read_text()
    assert "failure-as-number" in html
    assert "TimeoutError: 10 s" in html
    assert "<script" not in html
    assert main(["audit", str(file), "--ignore", "[failure-as-number]"]) == 0  # what is accepted is left out
    (tmp_path / "empty").mkdir()
    assert main(["audit", str(tmp_path / "empty")]) == 1
    assert "there are no rollouts" in capsys.readouterr().err


def test_a_mean_is_that_of_its_own_rollouts(tmp_path: Path) -> None:
    """Neither of those of an evaluation, nor of another file beside it."""
    rows = [{"example_id": i, "prompt": f"q{i}", "completion": f"{i}", "reward": float(i % 2)} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b_aggregate_metrics.json").write_text(json.dumps([{"agent_metrics": {"mean/reward": 0.9}}]))
    for mean, kinds in ((0.5, []), (4 / 9, ["mean-differs"])):
        (tmp_path / "metadata.json").write_text(json.dumps({"avg_reward": mean}))
        assert [finding.kind for finding in audit(tmp_path / "a.jsonl", AuditConfig()).findings] == kinds
    (tmp_path / "metadata.json").write_text(json.dumps({"avg_reward": 0.5}))
    (tmp_path / "other").mkdir()
    all_right = [row | {"prompt": f"p{i}", "reward": 1.0} for i, row in enumerate(rows)]
    (tmp_path / "other/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in all_right))
    found = audit(tmp_path / "a.jsonl", AuditConfig(), evaluation=tmp_path / "other/results.jsonl").findings
    assert "mean-differs" not in [finding.kind for finding in found]


def test_evaluation_problems(tmp_path: Path) -> None:
    """The same numbers with other names are the same problem."""
    traces = honest()
    train, test = write(tmp_path / "train.jsonl", traces), tmp_path / "test.jsonl"
    problem = traces[40].prompt.replace("apples", "plums").replace("pears", "kiwis").lower()
    others = [f"What is {i} times {i + 1}?" for i in range(10, 20)]
    test.write_text("".join(json.dumps({"prompt": text, "answer": "5"}) + "\n" for text in (problem, *others)))
    (finding,) = audit(train, AuditConfig(), evaluation=test).findings
    assert (finding.kind, {trace.prompt for trace in finding.where}) == ("leakage", {traces[40].prompt, problem})
    write(test, traces[40:41])  # rollouts of another file
    assert [finding.kind for finding in audit(train, AuditConfig(), evaluation=test).findings] == ["leakage"]


SOURCE = """
import random

def _answer(text):
    return text.rpartition("####")[2].strip()

def right(completions, answer, **_):
    return [float(_answer(text) == _answer(gold)) for text, gold in zip(completions, answer)]

def lenient(completions, answer, **_):
    return [1.0 for _ in completions]

def dice(completions, **_):
    return [random.random() for _ in completions]

def annealed(completions, answer, trainer_state, **_):
    assert trainer_state.global_step / trainer_state.max_steps == 0
    return right(completions, answer)

def falls(completions, **_):
    return [len(text) and 1 / (len(text) % 7) for text in completions]
"""


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        ("right", []),
        ("annealed", ["scored-otherwise"]),  # it may divide by the steps of its run
        ("lenient", ["always-same", "scored-otherwise"]),
        ("dice", ["nondeterministic"]),
        ("falls", ["reward-fails", "scored-otherwise"]),
    ],
)
def test_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, kinds: list[str]) -> None:
    monkeypatch.setattr(module, "Scorer", partial(Scorer, isolated=False))  # processes have tests of their own
    (tmp_path / "mine.py").write_text(SOURCE)
    file = write(tmp_path / "mine.jsonl", honest())
    result = audit(file, AuditConfig(), [f"{tmp_path / 'mine.py'}:{function}"])
    assert [finding.kind for finding in result.findings] == kinds


def test_a_reward_whose_column_was_never_recorded_is_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    traces = honest()
    for trace in traces:
        trace.columns.clear()
    file = write(tmp_path / "mine.jsonl", traces)
    with pytest.raises(RewardError, match="asks for the column 'answer'"):
        audit(file, AuditConfig(), [f"{tmp_path / 'mine.py'}:right"])


def test_a_reward_of_tokens_is_not_scored_on_rollouts_without_ids(tmp_path: Path) -> None:
    rows = [{"input": f"2 + {i}?", "output": "so 5", "gts": "5", "score": -0.3 * (i % 2), "step": 1} for i in range(8)]
    file = tmp_path / "1.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AuditConfig(arguments={"target": 1})
    with pytest.raises(RewardError, match="asks for completion_ids"):
        audit(file, config, ["length_penalty"])


def test_ids_with_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet(), start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    traces = honest()
    for trace in traces:
        trace.token_ids = tokenizer.encode(trace.completion).ids
        trace.logprobs = trace.logprobs[1:]
        trace.calls = []
    file = write(tmp_path / "mine.jsonl", traces)
    assert audit(file, AuditConfig(), tokenizer=tmp_path).findings == []
    traces[5].token_ids[3] = alphabet["Z"]
    write(file, traces)
    assert [finding.kind for finding in audit(file, AuditConfig(), tokenizer=tmp_path).findings] == ["round-trip"]


def test_a_page_shows_the_first_rollouts() -> None:
    traces = honest()
    html = page(Report("128 rollouts", [found("stale", "old & slow", traces)], {"tied groups": "1 of 2"}))
    assert html.count("<article>") == 20
    assert "and 108 more" in html
    assert "old &amp; slow" in html
    assert "Nothing was found" in page(Report("no rollouts"))


@pytest.mark.slow
def test_neither_torch_nor_ray_is_loaded() -> None:
    heavy = "('torch', 'ray', 'transformers', 'pyarrow')"
    code = f"import sys, rewards.audit.audit, rewards.commands.printer; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

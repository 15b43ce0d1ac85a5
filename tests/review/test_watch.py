"""`review.watch`: a trainer of TRL trains as without it, and its run folder is one that every instrument reads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from policies.presets import small_tokenizer
from review.compare.compare import compare
from review.findings.report import diagnose
from review.page.report import report
from review.readers.record import Record
from review.readers.run_folder import read_events, read_metrics
from review.watch import Watcher, watch
from rewards.audit.audit import audit
from rewards.audit.options import AuditConfig
from rewards.records import read_rollouts, recorded_steps, split_groups

trl = pytest.importorskip("trl")
ROWS = [{"prompt": f"{a} + {b} = ?\n", "answer": f"#### {a + b}"} for a in range(4) for b in range(4)]
STEPS = 3
ROOT = Path(__file__).parents[2]


def different(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
    log_extra("length", [len(text) for text in completions])
    return [float(len(set(text)) % 3) for text in completions]


def odd(completions: list[str], **_: Any) -> list[float | None]:
    return [None if ord(text[:1] or "a") % 2 else 1.0 for text in completions]


def trainer_of(folder: Path, kind: str = "GRPO", adapters: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = small_tokenizer([row["prompt"] + row["answer"] for row in ROWS], 300)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    given = {
        **{"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": STEPS},
        **{"logging_steps": 1, "learning_rate": 1e-3, "seed": 1, "save_strategy": "no", "reward_weights": [1.0, 0.5]},
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True},
    }
    arguments = getattr(trl, f"{kind}Config")(str(folder), **(given | options))
    return getattr(trl, f"{kind}Trainer")(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)),
        processing_class=tokenizer,
        reward_funcs=[different, odd],
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapters else None,
    )


def trained(folder: Path, *, watched: bool, **options: Any) -> Any:
    trainer = trainer_of(folder, **options)
    if watched:
        assert watch(trainer) is trainer
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    trained(folder, watched=True)
    return folder / "watched"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPO", {"gradient_accumulation_steps": 2, "num_iterations": 2}),
        ("GRPO", {"mask_truncated_completions": True}),
        ("GRPO", {"adapters": True, "beta": 0.1}),
        ("RLOO", {"beta": 0.0}),
    ],
)
def test_a_watched_trainer_ends_with_the_same_weights(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    plain = trained(tmp_path / "plain", watched=False, kind=kind, **options)
    watched = trained(tmp_path / "seen", watched=True, kind=kind, **options)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    folder = tmp_path / "seen/watched"
    assert [event["event"] for event in read_events(folder)] == ["begin", "end"]
    lines = read_rollouts(folder, 1)
    assert len(lines) == 8 * options.get("gradient_accumulation_steps", 1)
    assert all(0 < len(line["token_ids"]) <= 8 for line in lines)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_the_first_writes_the_completions_of_both(tmp_path: Path) -> None:
    script = ROOT / "tests/cases/watched_ranks.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run([*command, str(tmp_path)], env=environment, check=True, timeout=300)
    plain, watched = (load_file(tmp_path / how / "weights.safetensors") for how in ("plain", "watched"))
    assert all(torch.equal(weight, watched[name]) for name, weight in plain.items())
    lines = read_rollouts(tmp_path / "watched/watched", 1)
    groups = split_groups(lines)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert all(len({line["prompt"] for line in group}) == 1 for group in groups)
    assert all(len(line["policy_logprobs"]) == len(line["token_ids"]) for line in lines)
    assert all(line["extras"] == {"length": len(line["text"])} for line in lines)


def test_the_record_has_what_the_trainer_has_computed(run: Path) -> None:
    assert recorded_steps(run) == [1, 2, 3]
    prompts = {row["prompt"]: row["answer"] for row in ROWS}
    for line in read_rollouts(run, 2):
        assert prompts[line["prompt"]] == line["gold"]
        parts = line["parts"]
        assert parts["different"] == len(set(line["text"])) % 3
        assert line["reward"] == parts["different"] + 0.5 * (parts["odd"] or 0.0)
        assert len(line["policy_logprobs"]) == len(line["token_ids"])
        assert line["extras"] == {"length": len(line["text"])}
    second = read_metrics(run)[1]
    rewards = [line["reward"] for line in read_rollouts(run, 2)]
    assert math.isclose(second["reward/mean"], sum(rewards) / len(rewards))
    assert {"loss/total", "learner/grad_norm", "learner/learning_rate", "policy/entropy"} <= second.keys()


def test_the_learners_log_probabilities_are_those_of_the_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=0.0)
    watch(trainer).train()
    line = read_rollouts(tmp_path / "watched", 1)[0]
    prompt = trainer.processing_class(line["prompt"])["input_ids"]
    with torch.no_grad():
        logits = trainer.model(torch.tensor([prompt + line["token_ids"]])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(line["token_ids"])[:, None])[:, 0]
    assert line["policy_logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_every_instrument_reads_the_folder(run: Path, tmp_path: Path) -> None:
    assert {finding.kind for finding in diagnose(Record(run))} <= {"clipped"}  # no completion of noise ends
    assert report(run, tmp_path / "report.html", None).stat().st_size > 10_000
    assert compare([run], [], []) is not None
    assert [finding.kind for finding in audit(run, AuditConfig()).findings] == []
    record = Record(run)
    assert record.options["rollout.group_size"] == 4
    assert record.options["learner.learning_rate"] == 1e-3
    assert record.state == "step 3 of 3, finished"


def test_what_fails_in_the_record_is_an_event_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Watcher, "_write_rollouts", fails)
    trainer = trained(tmp_path, watched=True)
    assert trainer.state.global_step == STEPS
    failures = [event for event in read_events(tmp_path / "watched") if event["event"] == "watch_failed"]
    assert len(failures) == 3
    assert failures[0]["error"] == "OSError: No space left on device"


def test_a_training_that_goes_on_keeps_its_lines_and_makes_later_ones_again(tmp_path: Path) -> None:
    trained(tmp_path, watched=True, save_strategy="steps", save_steps=2)
    before = [line["reward/mean"] for line in read_metrics(tmp_path / "watched")]
    again = watch(trainer_of(tmp_path))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = read_metrics(tmp_path / "watched")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["reward/mean"] for line in lines][:2] == before[:2]
    assert [event["event"] for event in read_events(tmp_path / "watched")] == ["begin", "end", "resume", "end"]


def test_what_is_no_trainer_of_grpo_is_refused() -> None:
    with pytest.raises(TypeError, match="str has no _generate_and_score_completions: give a GRPOTrainer of trl"):
        watch("trainer")  # type: ignore[type-var]

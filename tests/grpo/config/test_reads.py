"""Contract 18: an option that is accepted is read. Each command runs in small, and what it reads of its options is
recorded: a read that only refuses the option, copies it or writes it down does not count."""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3ForSequenceClassification

from grpo.config.options import Options, _options
from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.terms.draft_head import teaching
from grpo.learner.update import NonFiniteStep, Update
from grpo.task.check import check_plan
from grpo.task.task import Task

COPIES = ("/pydantic/", "grpo/config/options.py", "grpo/task/table.py")  # and writes down, and refuses
Reads = set[tuple[str, str]]


def definer(cls: type, field: str) -> str:
    """The class that a field comes from: commands with another default of it have classes of their own."""
    return [base.__name__ for base in cls.__mro__ if field in inspect.get_annotations(base)][-1]


@contextmanager
def recorded() -> Iterator[Reads]:
    """The fields of options that are read inside, each with the class that it comes from."""
    reads: Reads = set()

    def read(self: Options, name: str) -> Any:
        cls = type(self)
        if name in cls.__pydantic_fields__:
            code = sys._getframe(1).f_code
            checks = "grpo/config/" in code.co_filename and code.co_name.startswith("_")
            if not checks and not any(place in code.co_filename for place in COPIES):
                reads.add((definer(cls, name), name))
        return object.__getattribute__(self, name)

    Options.__getattribute__ = read
    try:
        yield reads
    finally:
        del Options.__getattribute__


def unread(cls: type[Options], reads: Reads) -> set[str]:
    """The options of a command that nothing has read."""

    def of(cls: Any, prefix: str) -> Iterator[str]:
        for option in _options(cls.model_construct()):
            if "." in option.key:
                continue
            if option.model is not None:
                yield from of(option.model, f"{prefix}{option.key}.")
            is_section = option.model is not None and not option.in_list
            if not is_section and (definer(cls, option.key), option.key) not in reads:
                yield prefix + option.key

    return set(of(cls, ""))


@pytest.fixture(scope="module")
def policy_folder(micro_policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    policy = micro_policy()
    policy.save(folder)
    policy.config.num_labels, policy.config.pad_token_id = 1, None
    DeepseekV3ForSequenceClassification(policy.config).save_pretrained(folder.parent / "judge")
    policy.tokenizer.save_pretrained(folder.parent / "judge")
    return folder


@pytest.fixture
def not_finite(monkeypatch) -> None:
    """The first step of a run that skips such steps is not finite."""
    backward = Update.backward

    def once(update: Update, loss: Any, step: int, ranks: Any) -> None:
        if step == 1 and update.options.on_non_finite == "skip":
            raise NonFiniteStep("step 1: the loss is nan")
        backward(update, loss, step, ranks)

    monkeypatch.setattr(Update, "backward", once)


@pytest.fixture
def rows(tmp_path) -> dict[str, Any]:
    """Data without a split to evaluate, of which a share is held out."""
    lines = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": str(tmp_path / "rows.jsonl"), "held_out": 0.25}


def test_supervised_steps_read_all_their_options(micro_config, policy_folder, not_finite, rows, tmp_path):
    from grpo.sft import sft

    given = micro_config(tmp_path).model_dump(include={"model", "threads", "rewards", "data"})
    given |= {"reward_models": [{"name": "judge", "model": str(policy_folder.parent / "judge")}]}
    small = {"steps": 2, "prompts_per_step": 4, "rollout": {"max_completion_tokens": 10}, "log": {"trackers": []}}
    with recorded() as reads:
        sft(SftConfig(output_dir=tmp_path / "r", eval={"limit": 2}, learner={"workers": 0}, **given, **small))
        acts = {"environment": "calculator", "learner": {"on_non_finite": "skip"}}
        sft(SftConfig(output_dir=tmp_path / "e", eval={"limit": 2}, **given, **small, **acts))
        Task.of(SftConfig(output_dir=tmp_path / "h", **given | {"data": rows}), scores=False).close()
    assert unread(SftConfig, reads) == set()


def test_grpo_reads_all_its_options(micro_config, micro_policy, policy_folder, not_finite, rows, tmp_path):
    from grpo.steps.vllm import vllm_settings
    from grpo.train import train

    model = {"model": str(policy_folder), "warm_start.steps": 0}
    ties = {"rewards": [{"function": "gsm8k_format"}], "rollout.refill_draws": 1}
    reward_models = {"reward_models": [{"name": "judge", "model": str(policy_folder.parent / "judge")}]}
    agents = Path(__file__).parents[2] / "cases/agents.py"
    variants: list[dict[str, Any]] = [
        {"eval.limit": 2, "checkpoint.keep_best": True} | ties,
        {"lora.rank": 2, "loss.importance_correction": "token_truncate", "mtp.every": 1},
        {"loss.advantage": "gae", "learner.on_non_finite": "skip"},
        model | reward_models | {"loss.advantage": "distill", "distill.teacher": str(policy_folder)},
        {"environment": "calculator"},
        {"agent": f"{agents}:once", "program_workers": 1, "steps": 1},
    ]
    with recorded() as reads:
        for number, options in enumerate(variants):
            train(micro_config(tmp_path / str(number), **options))
        python = tmp_path / "python"  # vLLM is not installed here: what it would be started with
        state = '{"protocol": 2, "vllm": "0.99.0", "on_cpu": true, "tried": false, "tried_versions": []}'
        python.write_text(f"#!/bin/sh\necho '{state}'\n")
        python.chmod(0o755)
        outside = micro_config(tmp_path / "vllm", **{"rollout.backend": "vllm", "rollout.vllm.python": str(python)})
        with pytest.raises(ValueError, match="nobody has compared"):
            check_plan(outside)
        vllm_settings(outside.rollout, tmp_path)
        teaching(micro_policy(), outside.mtp, [], step=1, gain=1.0)  # drafts that gain too little
        Task.of(TrainConfig(output_dir=tmp_path / "h", data=rows), scores=False).close()
    assert unread(TrainConfig, reads) == set()

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
import uvicorn
from rich.console import Console
from transformers import DeepseekV3ForSequenceClassification

from grpo.cli.config.inference import EvalConfig, SampleConfig
from grpo.cli.config.serve import ServeConfig
from grpo.cli.quantize.options import QuantizeConfig
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.task.check import check_plan, task_of
from rewards.config.options import Options, _options, load

AGENTS = Path(__file__).parents[2] / "cases/agents.py"
QUIET = Console(quiet=True)
COPIES = ("/pydantic/", "rewards/config/options.py", "grpo/task/table.py")  # and writes down, and refuses
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
            place = code.co_filename
            of_options = any(folder in place for folder in ("grpo/config/", "grpo/cli/config/", "rewards/config/"))
            checks = of_options and code.co_name.startswith("_")
            if not checks and not any(copy in place for copy in COPIES):
                reads.add((definer(cls, name), name))
        return object.__getattribute__(self, name)

    Options.__getattribute__ = read
    try:
        yield reads
    finally:
        del Options.__getattribute__


def unread(cls: type[Options], reads: Reads) -> set[str]:
    """The options of a command that nothing has read. Data that are evaluated are read as those of a run."""
    copied = {("EvaluatedDataOptions", name) for source, name in reads if source == "SourceOptions"}

    def of(cls: Any, prefix: str) -> Iterator[str]:
        for option in _options(cls.model_construct()):
            if "." in option.key:
                continue
            if option.model is not None:
                yield from of(option.model, f"{prefix}{option.key}.")
            is_section = option.model is not None and not option.in_list
            if not is_section and (definer(cls, option.key), option.key) not in reads | copied:
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
def judged(policy_folder, letters) -> dict[str, Any]:
    """A policy on problems of its level, and a reward function and a reward model that score it."""
    judge = {"function": f"model:{policy_folder.parent / 'judge'}"}
    return {
        "model": str(policy_folder),
        "threads": 1,
        "data.task_options.levels": [1],
        "rewards": [{"function": letters}, judge],
        "rollout.max_completion_tokens": 8,
        "rollout.draft_tokens": 1,
        "eval.limit": 2,
    }


@pytest.fixture
def rows(tmp_path) -> dict[str, Any]:
    """Data without a split to evaluate, of which a share is held out."""
    lines = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": str(tmp_path / "rows.jsonl"), "held_out": 0.25}


@pytest.mark.slow
def test_contract_18_supervised_steps_read_all_their_options(micro_config, policy_folder, rows, tmp_path):
    from grpo.sft import sft

    given = micro_config(tmp_path).model_dump(include={"model", "threads", "rewards", "data"})
    given["rewards"] += [{"function": f"model:{policy_folder.parent / 'judge'}"}]
    small = {"steps": 2, "prompts_per_step": 4, "rollout": {"max_completion_tokens": 10}, "log": {"trackers": []}}
    with recorded() as reads:
        sft(SftConfig(output_dir=tmp_path / "r", eval={"limit": 2}, learner={"workers": 0}, **given, **small))
        acts = {"environment": "calculator"}
        sft(SftConfig(output_dir=tmp_path / "e", eval={"limit": 2}, **given, **small, **acts))
        several = given | {"data": [rows, {"name": "word_problems"}]}
        task_of(SftConfig(output_dir=tmp_path / "h", **several), scores=False).close()
    assert unread(SftConfig, reads) == set()


@pytest.mark.slow
def test_contract_18_grpo_reads_all_its_options(micro_config, policy_folder, rows, tmp_path, monkeypatch):
    from grpo.steps.vllm import vllm_settings
    from grpo.train import train

    model = {"model": str(policy_folder)}
    ties = {"rewards": [{"function": "gsm8k_format"}], "rollout.max_resamples": 1}
    judge = {"rewards": [{"function": f"model:{policy_folder.parent / 'judge'}"}]}
    variants: list[dict[str, Any]] = [
        {"eval.limit": 2, "checkpoint.keep_best": True, "curriculum.shortest_share": 0.5, "sft.steps": 1} | ties,
        {"lora.rank": 2, "loss.importance_correction": "token_truncate"},
        {"loss.advantage": "gae"},
        model | judge | {"loss.advantage": "distill", "distill.teacher": str(policy_folder)},
        {"environment": "calculator"},
        {"agent": f"{AGENTS}:once"},
    ]
    small = {"steps": 1, "prompts_per_step": 2, "rollout.max_completion_tokens": 6, "sft.steps": 0}
    with recorded() as reads:
        for number, options in enumerate(variants):
            train(micro_config(tmp_path / str(number), **small | options))
        python = tmp_path / "python"  # vLLM is not installed here: what it would be started with
        state = '{"protocol": 2, "vllm": "0.99.0", "on_cpu": true, "tried": false, "tried_versions": []}'
        python.write_text(f"#!/bin/sh\necho '{state}'\n")
        python.chmod(0o755)
        monkeypatch.setenv("QUARTET_VLLM_PYTHON", str(python))
        outside = micro_config(tmp_path / "vllm", **{"rollout.backend": "vllm"})
        check_plan(outside)
        vllm_settings(outside.rollout, tmp_path)
        task_of(TrainConfig(output_dir=tmp_path / "h", data=[rows, {"name": "word_problems"}]), scores=False).close()
    assert unread(TrainConfig, reads) == set()


def test_contract_18_teaching_a_draft_head_reads_all_its_options(judged, rows, tmp_path):
    from grpo.cli.mtp import mtp

    small = {"steps": 2, "prompts_per_step": 4, "rollout.group_size": 2, "mtp.epochs": 1, "mtp.depth": 1}
    small |= {"mtp.solutions": 1, "mtp.draft_vocabulary": 16, "log.trackers": [], "data.limit": 24}
    with recorded() as reads:
        mtp(load(MtpConfig, None, judged | small | {"output_dir": tmp_path / "r"}))
        task_of(MtpConfig(output_dir=tmp_path / "h", data=[rows, {"name": "word_problems"}]), scores=False).close()
    assert unread(MtpConfig, reads) == set()


@pytest.fixture
def acts(judged, rows) -> list[dict[str, Any]]:
    """What is evaluated in several ways: with few words, by tools, by an agent, and a share that was held out."""
    return [
        judged | {"data.name": "word_problems", "stop": ["x"]},
        judged | {"environment": "calculator", "rewards": judged["rewards"][:1], "eval.greedy": False},
        judged | {"agent": f"{AGENTS}:once", "rewards": judged["rewards"][:1], "eval.limit": 1},
        judged | {"data": rows, "rewards": judged["rewards"][:1]},
    ]


@pytest.mark.slow
def test_contract_18_an_evaluation_reads_all_its_options(acts, tmp_path):
    from grpo.cli.commands.eval import evaluate_model
    from grpo.cli.commands.served import open_served

    with recorded() as reads:
        for number, given in enumerate(acts):
            evaluate_model(load(EvalConfig, None, given | {"output": tmp_path / str(number)}), QUIET)
        with pytest.raises(ValueError, match="there is no such file"):
            open_served(EvalConfig(model="http://127.0.0.1:1", api_key_file=tmp_path / "key"))
    assert unread(EvalConfig, reads) == set()


def test_contract_18_sampling_reads_all_its_options(policy_folder, rows):
    from grpo.cli.commands.sample import prompts_of, sample

    given = {"model": str(policy_folder), "threads": 1, "samples": 1, "rollout.max_completion_tokens": 8}
    with recorded() as reads:
        worked = {"data.name": rows["name"], "data.few_shot": 1, "data.template": "{question}"}
        word_problems = {"data.few_shot": 1, "data.template": "{question}"}
        for more in (worked, word_problems, {"environment": "calculator"}):
            sample(load(SampleConfig, None, given | more), prompts_of(["1 + 1 = ?"], None), QUIET)
    assert unread(SampleConfig, reads) == set()


def test_contract_18_a_server_reads_all_its_options(policy_folder, monkeypatch, tmp_path):
    pytest.importorskip("tinker")
    from grpo.cli.serve.server import serve
    from grpo.cli.serve.training import serve_training

    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)  # it has all that it needs by then
    given = {"model": str(policy_folder), "threads": 1, "port": 0, "state": tmp_path / "state"}
    with recorded() as reads:
        serve(load(ServeConfig, None, given))
        serve_training(load(ServeConfig, None, given))
    assert unread(ServeConfig, reads) == set()


@pytest.mark.slow
def test_contract_18_quantising_reads_all_its_options(acts, tmp_path, monkeypatch):
    from grpo.cli.quantize import compressor, quantize

    monkeypatch.setattr(compressor, "require_packages", lambda: None)  # the files keep their precision
    monkeypatch.setattr(compressor, "quantize", lambda *_, **__: [])
    monkeypatch.setattr(compressor, "save", lambda policy, folder: policy.save(folder))
    monkeypatch.setattr(quantize, "WINDOW", 16)
    monkeypatch.setattr(quantize.metadata, "version", lambda name: "0")
    small = {"calibrate": "word_problems", "calibrate_tokens": 64, "held_out_tokens": 32}
    with recorded() as reads:
        for number, given in enumerate(acts):
            config = load(QuantizeConfig, None, given | small | {"output": tmp_path / str(number)})
            quantizer = quantize.Quantizer(config, QUIET)
            if number:
                quantizer._text()
                quantizer._evaluate(config.model, "before")
            else:
                quantize.show(quantizer.quantize(tmp_path / "to"), QUIET)
    assert unread(QuantizeConfig, reads) == set()

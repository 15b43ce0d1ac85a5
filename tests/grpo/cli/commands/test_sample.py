import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo.cli.commands.sample import Sampled, read_prompts, sample
from grpo.cli.commands.summary import groups_as_json
from grpo.cli.config.inference import SampleConfig
from grpo.cli.parse import main
from grpo.task.task import Task
from grpo.train import train
from rewards.config.options import load
from rollout.faults import RolloutError


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _groups(model: str, path: Path, **given) -> list[dict]:
    options = {"model": model, "threads": 1, "samples": 3, "rollout.max_completion_tokens": 12} | given
    return groups_as_json(_sampled(load(SampleConfig, None, options), path).groups)


def _sampled(config: SampleConfig, path: Path) -> Sampled:
    return sample(config, read_prompts(path), Console(quiet=True))


def test_prompts_are_lines_of_json(tmp_path):
    row = {"prompt": "2 + 3 = ?", "topic": "sums"}
    path = _write(tmp_path / "mine.jsonl", json.dumps(row), "", '{"prompt": "Grüße\\u2028!"}')
    first, second = read_prompts(path)
    assert (first.example_id, first.question, first.columns) == ("line 1", "2 + 3 = ?", row)
    assert (second.example_id, second.question) == ("line 3", "Grüße\u2028!")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bad.jsonl holds no prompts; write one \{\"prompt\": ...\} a line"),
        ('{"prompt": "a"}\n{"prompt": "b\n', r"bad.jsonl, line 2: not JSON"),
        ('{"promt": "a"}\n', r'bad.jsonl, line 1: expected \{"prompt": "some text"\}, got \{"promt": "a"\}'),
        ('{"prompt": 3}', "line 1: expected"),
        ('{"prompt": ""}', "line 1: expected"),
        ('["a"]', "line 1: expected"),
        ("2 + 3 = ?", "line 1: not JSON"),
        ('{"prompt": "\xff"}', "bad.jsonl"),  # as it is encoded below, it is no text
        (None, "bad.jsonl: there is no such file"),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "bad.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "bad.jsonl")


@pytest.mark.slow
def test_a_completion_ends_at_a_stop_string(model, tmp_path):
    path = _write(tmp_path / "p.jsonl", '{"prompt": "2 + 3 = ?"}')
    [whole] = _groups(model, path)
    stop = whole["completions"][0]["text"][2:4]
    [cut] = _groups(model, path, stop=stop)
    for one, other in zip(whole["completions"], cut["completions"], strict=True):
        assert other["text"] == one["text"].split(stop)[0]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.9, 0.0])
def test_contract_3_the_tokens_are_the_same_whatever_is_drafted(model, tmp_path, temperature):
    path = _write(tmp_path / "p.jsonl", *(json.dumps({"prompt": f"Ann has {i} pens. "}) for i in range(5)))
    plain = _groups(model, path, seed=11, **{"rollout.draft_tokens": 0, "rollout.temperature": temperature})
    for drafts in (1, 2, 4, None):
        drafted = _groups(model, path, seed=11, **{"rollout.draft_tokens": drafts, "rollout.temperature": temperature})
        for group, other in zip(plain, drafted, strict=True):
            for a, b in zip(group["completions"], other["completions"], strict=True):
                assert a["token_ids"] == b["token_ids"]
                assert a["text"] == b["text"]
                assert a["finish_reason"] == b["finish_reason"]
                assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
                assert b["draft"]["target_forwards"] <= a["draft"]["target_forwards"]
    if temperature:
        assert _groups(model, path, seed=12, **{"rollout.draft_tokens": 0, "rollout.temperature": temperature}) != plain
        assert len({tuple(c["token_ids"]) for c in plain[0]["completions"]}) > 1
    else:
        assert len({tuple(c["token_ids"]) for c in plain[0]["completions"]}) == 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_tokens_in_a_copy_that_has_grown(model, tmp_path):
    lines = [json.dumps({"prompt": f"Ann has {i} pens. "}) for i in range(4)]
    first = _groups(model, _write(tmp_path / "p.jsonl", *lines[:2]), seed=5)
    grown = _groups(model, _write(tmp_path / "a_longer_copy.jsonl", *lines), seed=5)
    assert [c["token_ids"] for c in grown[0]["completions"]] == [c["token_ids"] for c in first[0]["completions"]]


def test_contract_2_logprobs_are_those_of_the_stock_model(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    [group] = _groups(
        model, _write(tmp_path / "p.jsonl", '{"prompt": "Tom has 5 pens. "}'), **{"rollout.temperature": 0.7}
    )
    prompt = tokenizer.encode(group["prompt"])
    for completion in group["completions"]:
        ids = torch.tensor([prompt + completion["token_ids"]])
        with torch.no_grad():
            logprobs = (stock(ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion["logprobs"]), expected, rtol=0, atol=1e-4)


def test_prompts_that_cannot_be_continued_are_refused(model, tmp_path):
    path = _write(tmp_path / "p.jsonl", json.dumps({"prompt": "pens " * 300}))
    with pytest.raises(RolloutError, match=r"prompt 'line 1' has \d+ tokens; .*passes the context of 256"):
        _groups(model, path)
    both = _write(tmp_path / "p.jsonl", '{"prompt": "2 + 3 = ?"}', json.dumps({"prompt": "pens " * 300}))
    sampled = _sampled(
        load(SampleConfig, None, {"model": model, "threads": 1, "rollout.max_completion_tokens": 4}), both
    )
    assert [group.prompt.prompt_id for group in sampled.groups] == ["line 1"]
    assert sampled.faults.startswith("prompt 'line 2' has ")
    path = _write(tmp_path / "p.jsonl", '{"prompt": "2 + 3 = ?"}')
    with pytest.raises(ValueError, match=r"asks for \{prom\}; the columns are"):
        _groups(model, path, **{"data.template": "{prom}"})
    with pytest.raises(ValueError, match="no chat template"):
        _groups(model, path, **{"data.template": "chat"})


def test_margin_is_counted_and_named(model, tmp_path):
    path = _write(tmp_path / "p.jsonl", '{"prompt": "Tom has 5 pens. "}')
    [group] = _groups(model, path, **{"rollout.lossy_margin": 1e9, "rollout.draft_tokens": 2})
    assert json.loads(json.dumps(group, allow_nan=False)) == group
    assert all(len(c["draft"]["drafted"]) == len(c["draft"]["accepted"]) == 2 for c in group["completions"])
    assert all(c["draft"]["fallbacks"] >= c["draft"]["target_forwards"] - 1 for c in group["completions"])
    with pytest.raises(RolloutError, match="accept=margin takes drafts unverified, but there are none"):
        _groups(model, path, **{"rollout.lossy_margin": 2.0, "rollout.draft_tokens": 0})


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory):
    """A run whose template, worked example and sampling are not the defaults, and its configuration."""
    folder = tmp_path_factory.mktemp("sample") / "run"
    given = {"steps": 1, "sft.steps": 0, "data.template": "Q: {question}\nA: ", "data.few_shot": 1, "seed": 3}
    config = micro_config(folder, **given | {"rollout.temperature": 0.8})
    train(config)
    return folder, config


def _sample(*words, out: Path) -> list[dict]:
    assert main(["sample", *map(str, words), "--threads", "1", "--samples", "1", "--json", str(out)]) == 0
    return json.loads(out.read_text())["groups"]


def _texts(monkeypatch) -> list[str]:
    """The texts of the prompts that are sampled from now on."""
    seen = []

    def keep(config, examples, console, kept=sample):
        sampled = kept(config, examples, console)
        seen.extend(group.prompt.text for group in sampled.groups)
        return sampled

    monkeypatch.setattr("grpo.cli.commands.sample.sample", keep)
    return seen


def test_a_prompt_looks_as_the_run_was_trained_on(run, tmp_path, monkeypatch, capsys):
    folder, config = run
    texts = _texts(monkeypatch)
    with Task.of(config) as task:
        example = task.train[4]
        trained_on = task.template.render(example)
    [group] = _sample(folder, "--prompt", example.question, out=tmp_path / "out.json")
    assert texts == [trained_on]
    assert trained_on.count("Q: ") == 2  # the worked example is in front
    assert group["prompt"] == example.question
    assert len(group["completions"][0]["token_ids"]) <= 10  # rollout.max_completion_tokens of the run
    shown = capsys.readouterr().out
    assert "as in the run: template 'Q: {question}\\nA: ' and 1 worked examples" in shown


def test_a_template_of_the_command_line_wins_over_the_runs(run, tmp_path, monkeypatch):
    texts = _texts(monkeypatch)
    words = ["--prompt", "2 + 3 = ", "--data.template", "Sum: {prompt}", "--data.few_shot", "0"]
    [group] = _sample(run[0], *words, out=tmp_path / "new/folder/out.json")
    assert texts == ["Sum: 2 + 3 = "]
    assert group["prompt"] == "2 + 3 = "  # as it was given


@pytest.mark.slow
def test_a_checkpoint_inside_a_run_brings_the_runs_template(micro_config, tmp_path, monkeypatch):
    given = {"data.template": "{problem} = ", "data.prompt_column": "problem", "data.limit": None}
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"problem": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(8)))
    options = {"steps": 2, "sft.steps": 1, "data.name": str(file)}
    train(micro_config(tmp_path / "run", **given | options))
    texts = _texts(monkeypatch)
    _sample(tmp_path / "run/checkpoints/step_000001", "--prompt", "3 + 1", out=tmp_path / "out.json")
    assert texts == ["3 + 1 = "]


def test_prompts_come_from_the_command_line_and_standard_input(model, tmp_path, monkeypatch):
    lines = b'{"prompt": "Ann has"}\n2 + 3 =\n\n  \n7 pens\r\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    words = ["--prompt", "Tom has", "--prompt", "-3 + 5 =", "--prompts", "-", "--rollout.max_completion_tokens", "2"]
    groups = _sample(model, *words, out=tmp_path / "out.json")
    assert [group["prompt"] for group in groups] == ["Tom has", "-3 + 5 =", "Ann has", "2 + 3 =", "7 pens"]


def test_standard_input_or_a_command_without_prompts_is_refused(model, monkeypatch, capsys):
    for given, message in (
        (b"\n\n", "standard input holds no prompts"),
        (b"\xff\n", "standard input is not UTF-8 text"),
        (b'a\n{"prompt": \n', "standard input, line 2: not JSON"),
        (b'{"promt": "a"}\n', "standard input, line 1: expected"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(["sample", model, "--prompts", "-"]) == 1
        assert message in capsys.readouterr().err
    assert main(["sample", model, "--prompt", ""]) == 1
    assert '--prompt "": is empty' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", model])
    assert 'there are no prompts: give --prompt "some text"' in capsys.readouterr().err

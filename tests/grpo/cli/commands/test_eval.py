"""`quartet eval`: what a run brings along, which policy is meant, what is written; figures checked by other means."""

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from grpo.cli.commands import eval as eval_command
from grpo.cli.commands import eval_report
from grpo.cli.commands.eval import evaluate_model, peak_memory_gib
from grpo.cli.commands.export import export
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.evaluation.perplexity import Perplexity, gold_perplexity
from grpo.learner.row import PackedRow, Sample
from grpo.run import checkpoint
from grpo.source.policy_source import find_policy, load_found
from grpo.train import train
from policies import tensor_files
from policies.policy import PolicyError
from rewards.config.names import leaves
from rewards.config.options import ConfigError, load
from rollout.faults import RolloutError

QUIET = Console(quiet=True)


def _config(folder, **given) -> EvalConfig:
    return load(EvalConfig, None, defaults_of_run(folder) | {"model": str(folder), "threads": 1} | given)


def _same_results(a, b) -> bool:
    """But for what depends on the clock, or on which rows are decoded together."""
    other = ("seconds", "tokens_per_second", "groups", "tokens_per_forward", "acceptance", "fallback_rate")
    tokens = [[c.token_ids for group in result.groups for c in group.completions] for result in (a, b)]
    return tokens[0] == tokens[1] and all(vars(a)[name] == vars(b)[name] for name in vars(a) if name not in other)


@pytest.fixture(scope="module")
def trained(micro_config, tmp_path_factory):
    """The folder of a run with nothing at its default that decides what is evaluated, and its summary."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    given = {
        "seed": 3,
        "steps": 1,
        "sft.steps": 1,
        "data.task_options.levels": [1, 2],
        "data.template": "Q: {question}\nA: ",
        "data.few_shot": 1,
        "eval.limit": 5,
        "rollout.temperature": 0.8,
    }
    return folder, train(micro_config(folder, **given))


@pytest.fixture
def shown(monkeypatch) -> Console:
    """What a command prints on a terminal of 80 columns."""
    console = Console(width=80, force_terminal=False, record=True, file=io.StringIO())
    monkeypatch.setattr("grpo.cli.commands.summary.CONSOLE", console)
    return console


def test_a_run_folder_brings_its_held_out_problems_along(trained):
    """`quartet eval RUN` meets the problems, prompts and noise of the run's own last evaluation."""
    folder, summary = trained
    config = _config(folder)
    assert (config.data.template, config.eval.limit) == ("Q: {question}\nA: ", 5)
    before = {file: file.read_bytes() for file in (folder / "policy").iterdir()}
    results = evaluate_model(config, QUIET).results
    assert {file: file.read_bytes() for file in (folder / "policy").iterdir()} == before
    for name in ("sampled", "greedy"):
        assert _same_results(results[name], summary.evaluations[f"after GRPO, {name}"])
    assert results["sampled"].groups[0].prompt.text.count("Q: ") == 2  # the worked example is there


def test_other_data_come_without_the_runs_split_columns_and_limit(trained):
    folder, _ = trained
    brought = defaults_of_run(folder, data="gsm8k")
    assert {"rewards", "seed", "data.template", "rollout.temperature"} <= {*brought, *dict(leaves(brought))}
    assert not {"name", "split", "levels", "prompt_column", "solution_column"} & brought["data"].keys()
    assert "eval" not in brought
    assert defaults_of_run(folder, data="word_problems") == defaults_of_run(folder)
    assert defaults_of_run(folder.parent) == {}  # no run


def test_a_failing_reward_does_not_end_an_evaluation(trained, tmp_path, shown):
    folder, _ = trained
    assert "on_error: abort" in (folder / "config.yaml").read_text()
    first = evaluate_model(_config(folder, **{"eval.samples": 0, "data.few_shot": 0}), QUIET).results["greedy"]
    path = tmp_path / "picky.py"
    path.write_text(
        f"LIKED = {first.groups[0].prompt.columns['question']!r}\n"
        "def picky(completions, question, **_):\n"
        "    if set(question) != {LIKED}:\n        raise ValueError('not this one')\n"
        "    return [1.0] * len(completions)\n"
    )
    config = _config(folder, rewards=[{"function": f"{path}:picky"}], **{"eval.samples": 2, "data.few_shot": 0})
    evaluation = evaluate_model(config, QUIET)
    sampled = evaluation.results["sampled"]
    assert (sampled.completions, sampled.without_mark, sampled.abstained, sampled.accuracy) == (2, 8, 0, 1.0)
    document = eval_report.as_json(evaluation)["evaluations"]["sampled"]
    assert document["failures"] == {"picky: raised": 8}
    assert document["first_failures"][0]["message"].startswith("ValueError: not this one")
    eval_report.show(evaluation, shown)
    text = shown.export_text()
    assert "0 abstained, 8 failed" in text
    assert "REWARD FAILED 12 times (picky: raised)" in text  # greedy, too


@pytest.fixture(scope="module", params=[None, pytest.param(4, marks=pytest.mark.slow)], ids=["full", "lora"])
def unfinished(request, micro_config, tmp_path_factory):
    """A run that was stopped after its second step, and one that was not, with the same evaluation in between."""
    folder = tmp_path_factory.mktemp("unfinished")
    given = {"steps": 3, "eval.limit": 4, "eval.every": 2, "rollout.max_completion_tokens": 8}
    given |= {"lora.rank": request.param, "learner.learning_rate": 0.1} if request.param else {}
    train(micro_config(folder / "run", **given))
    shutil.copytree(folder / "run", folder / "stopped")
    shutil.rmtree(folder / "stopped/policy")
    shutil.rmtree(folder / "stopped/checkpoints/step_000003")
    return folder


@pytest.fixture
def copied(unfinished, tmp_path) -> Callable[[str], Path]:
    """`copied("run")`: a copy, which a test may change."""
    return lambda name: Path(shutil.copytree(unfinished / name, tmp_path / name))


@pytest.mark.slow
def test_an_unfinished_run_is_its_newest_checkpoint_and_says_so(unfinished):
    """The checkpoint's evaluation is the one that the run made there: same prompts, same noise, same weights."""
    folder = unfinished / "stopped"
    evaluation = evaluate_model(_config(folder), QUIET)
    assert evaluation.source.folder == str(folder / "checkpoints/step_000002")
    assert evaluation.source.meaning == "the newest checkpoint; the run has not ended"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [then] = [row for row in rows if row["step"] == 2 and "eval/reward_mean" in row]
    sampled = evaluation.results["sampled"]
    assert sampled.reward_mean == pytest.approx(then["eval/reward_mean"], abs=1e-6)
    assert sampled.length_mean == then["eval/completion_length_mean"]
    [before] = [row for row in rows if row["step"] == 0 and "eval/reward_mean" in row]
    assert sampled.reward_mean != pytest.approx(before["eval/reward_mean"], abs=1e-6)  # two steps have changed it


@pytest.mark.slow
def test_a_checkpoint_that_its_run_removes_meanwhile_is_evaluated_all_the_same(copied, monkeypatch):
    folder, task = copied("stopped"), eval_command.Task

    def rotated(*arguments, **named):
        shutil.rmtree(folder / "checkpoints")
        return task(*arguments, **named)

    monkeypatch.setattr(eval_command, "Task", rotated)
    evaluation = evaluate_model(_config(folder), QUIET)
    assert evaluation.source.checkpoint == folder / "checkpoints/step_000002"
    assert evaluation.results["sampled"].completions


@pytest.mark.parametrize(("module", "moment"), [(checkpoint, "fault"), (tensor_files, "read")])
def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_the_newer_one(copied, monkeypatch, module, moment):
    folder, real, removed = copied("stopped"), getattr(module, moment), []

    def rotated(*arguments, **named):
        if not removed:
            removed.append(1)
            os.rename(folder / "checkpoints/step_000002", folder / "checkpoints/step_000004")
        return real(*arguments, **named)

    monkeypatch.setattr(module, moment, rotated)
    found = find_policy(str(folder))
    assert found.checkpoint == folder / "checkpoints/step_000004"
    assert set(found.saved.tensors) == {"policy"}


def test_a_reader_repairs_nothing_in_a_run_that_may_be_alive(copied):
    """Between two renames of a save the former checkpoint is hidden; put back, it would fail that save."""
    folder = copied("stopped")
    os.rename(folder / "checkpoints/step_000002", folder / "checkpoints/.step_000002.replaced")
    assert find_policy(str(folder)).checkpoint == folder / "checkpoints/step_000001"
    assert (folder / "checkpoints/.step_000002.replaced").is_dir()


def _change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "generation_config.json"])
def test_a_policy_that_is_not_what_its_run_wrote_is_refused_by_name(copied, tmp_path, name):
    run, stopped = copied("run"), copied("stopped")
    (run / "policy/notes.txt").write_text("a file of mine harms nothing")
    find_policy(str(run))
    load_found(find_policy(str(run)), _config(run))
    _change(run / "policy" / name)
    _change(stopped / "warm_start" / name)
    for folder in (run, stopped):
        with pytest.raises(PolicyError, match=rf"is damaged: {name} is .*digests.json says .*; restore the file"):
            evaluate_model(_config(folder), QUIET)
        with pytest.raises(PolicyError, match=f"is damaged: {name} is "):
            export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_policy_that_was_changed_on_purpose_is_accepted_without_its_digests(copied, tmp_path):
    run = copied("run")
    options = run / "policy/generation_config.json"
    options.write_text(options.read_text().replace("{", '{"top_k": 7,', 1))
    (run / "policy/digests.json").unlink()
    load_found(find_policy(str(run)), _config(run))
    export(run, tmp_path / "out")
    assert not (tmp_path / "out/digests.json").exists()


def test_a_checkpoint_of_a_run_can_be_named(unfinished):
    step = unfinished / "run/checkpoints/step_000002"
    config = _config(step)
    assert config.data.name == "word_problems"
    assert config.eval.limit == 4
    assert find_policy(str(step)).meaning == f"a checkpoint of {unfinished / 'run'}"
    stopped = load_found(find_policy(str(unfinished / "stopped")), config).weights()
    assert all(
        torch.equal(tensor, stopped[name])
        for name, tensor in load_found(find_policy(str(step)), config).weights().items()
    )


def _dated(folder, policy: float, checkpoints: float):
    """The folder with every file of policy/ and of checkpoints/ of that time."""
    for part, when in (("policy", policy), ("checkpoints", checkpoints)):
        for path in (folder / part).rglob("*"):
            os.utime(path, (when, when))
    return str(folder)


def test_whether_a_run_went_on_is_not_told_by_the_times_of_its_files(unfinished, copied):
    """A copy without `cp -p` has times in the order of copying."""
    folder, newest = copied("run"), "checkpoints/step_000003"
    for times in ((1e9, 2e9), (2e9, 1e9)):
        found = find_policy(_dated(folder, *times))
        assert (found.folder, found.meaning, found.step) == (str(folder / "policy"), "the end of the run", 3)
    last = folder / "checkpoints/step_000005"
    shutil.copytree(unfinished / "run/checkpoints/step_000002", last)
    for times in ((1e9, 2e9), (2e9, 1e9)):
        found = find_policy(_dated(folder, *times))
        assert found.meaning == f"where the run ended first; it went on, to evaluate that name {last}"
        assert (found.folder, found.step) == (str(folder / "policy"), 3)
    shutil.rmtree(last)
    shutil.rmtree(folder / newest)  # resumed from step 2, and not ended again
    found = find_policy(_dated(folder, 2e9, 1e9))
    assert f"it went on, to evaluate that name {folder / 'checkpoints/step_000002'}" in found.meaning
    shutil.copytree(unfinished / "run/checkpoints/step_000002", folder / newest)  # reached step 3 again, another way
    assert "it went on" in find_policy(_dated(folder, 2e9, 1e9)).meaning


def test_a_resumed_run_records_its_new_end(copied):
    folder = copied("run")
    config = load(TrainConfig, folder / "config.yaml", {"output_dir": str(folder), "steps": 4})
    train(config, resume="auto", force=True)
    found = find_policy(str(folder))
    assert (found.meaning, found.step) == ("the end of the run", 4)


def test_before_the_first_checkpoint_it_is_the_sft_stage(copied):
    folder = copied("stopped")
    shutil.rmtree(folder / "checkpoints")
    found = find_policy(str(folder))
    assert (found.folder, found.meaning) == (str(folder / "warm_start"), "the SFT stage; no step of GRPO is saved yet")
    shutil.rmtree(folder / "warm_start")
    with pytest.raises(PolicyError, match="has not saved a policy yet"):
        find_policy(str(folder))


def test_a_checkpoint_on_a_preset_without_sft_stage_says_what_is_missing(copied):
    folder = copied("run")
    shutil.rmtree(folder / "warm_start")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"sft": config["sft"] | {"steps": 0}}))
    with pytest.raises(PolicyError, match="whose tokenizer is saved at the end of the run only"):
        evaluate_model(_config(folder / "checkpoints/step_000001", **{"eval.limit": 2}), QUIET)


@pytest.mark.slow
def test_drafts_never_change_an_evaluation(trained):
    folder, _ = trained
    runs = [
        evaluate_model(_config(folder, **given), QUIET).results
        for given in ({"rollout.draft_tokens": 0}, {"rollout.draft_tokens": 3}, {"rollout.prompts_per_shard": 2})
    ]
    for other in runs[1:]:
        for name in ("sampled", "greedy"):
            assert [g.completions[0].token_ids for g in runs[0][name].groups] == [
                g.completions[0].token_ids for g in other[name].groups
            ]
            assert runs[0][name].reward_mean == other[name].reward_mean


def test_several_samples_greedy_only_and_sampled_only(trained):
    folder, _ = trained
    rewards = [{"function": "gsm8k"}]
    both = evaluate_model(_config(folder, rewards=rewards, **{"eval.samples": 3}), QUIET).results
    assert (both["sampled"].completions, both["greedy"].completions) == (15, 5)
    assert list(both["sampled"].pass_at) == [1, 2]
    greedy = evaluate_model(_config(folder, rewards=rewards, **{"eval.samples": 0}), QUIET).results
    assert list(greedy) == ["greedy"]
    assert _same_results(greedy["greedy"], both["greedy"])
    sampled = evaluate_model(
        _config(folder, rewards=rewards, **{"eval.samples": 3, "eval.greedy": False}), QUIET
    ).results
    assert list(sampled) == ["sampled"]
    assert _same_results(sampled["sampled"], both["sampled"])
    with pytest.raises(ConfigError, match="eval.samples=0 and eval.greedy=false leave nothing to evaluate"):
        _config(folder, **{"eval.samples": 0, "eval.greedy": False})


def test_stop_strings_end_and_cut_what_is_scored_and_kept(trained, tmp_path):
    folder, _ = trained
    whole = evaluate_model(_config(folder, **{"eval.samples": 2}), QUIET).results["greedy"]
    text = next(c.text for group in whole.groups for c in group.completions if len(c.text) > 6)
    stop = text[4:6]
    evaluation = evaluate_model(
        _config(folder, stop=["never said", stop], output=tmp_path / "o", **{"eval.samples": 2}), QUIET
    )
    rows = [json.loads(line) for line in (tmp_path / "o/completions.jsonl").read_text().splitlines()]
    assert all(stop not in row["completion"] for row in rows)
    cut = evaluation.results["greedy"]
    for one, other in zip(whole.groups, cut.groups, strict=True):
        assert other.completions[0].text == one.completions[0].text.split(stop)[0]
        assert len(other.completions[0].token_ids) <= len(one.completions[0].token_ids)
    assert eval_report.as_json(evaluation)["options"]["stop"] == ["never said", stop]
    scored = [sum(c.isalpha() for c in group.completions[0].text) / 20 for group in cut.groups]
    assert cut.reward_mean == pytest.approx(sum(scored) / len(scored))


def test_how_stop_strings_are_given(capsys, trained):
    folder, _ = trained
    for words, meant in (
        (["--stop", "Question:"], ("Question:",)),
        (["--stop", r"\n\n"], ("\n\n",)),
        (["--stop", r'["Question:", "\n\n"]'], ("Question:", "\n\n")),
        ([], ()),
    ):
        assert main(["eval", str(folder), "--print_config", *words]) == 0
        assert EvalConfig(**yaml.safe_load(capsys.readouterr().out)).stop_strings == meant
    for command in (["eval", str(folder)], ["sample", str(folder), "--prompts", "x.jsonl"]):
        assert main([*command, "--stop", "[a, '']"]) == 2
        assert "an empty text would end every completion" in capsys.readouterr().err
    for key, why in (
        ("stop", "quartet train does not use it"),
        ("rollout.stop", "no such option"),
    ):  # contract 1: training learns from what was sampled, all of it
        assert main(["train", "--print_config", "--output_dir", "x", f"--{key}", "a"]) == 2
        assert f"{key}=a (command line): {why}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ours", "qwen3"])
def test_perplexity_is_that_of_each_solution_scored_alone_by_the_stock_model(kind, random_policy, hf_policy):
    policy = random_policy(1) if kind == "ours" else hf_policy(kind, 1)
    rows = [
        PackedRow([2, 3, 4], [Sample(0, [5, 6, 7, 0])]),
        PackedRow([9], [Sample(0, [4, 0])]),
        PackedRow([5] * 9, [Sample(0, [8])]),
    ]
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            [sample] = row.samples
            whole = torch.tensor([row.prompt_token_ids + sample.token_ids])
            logprobs = policy.trunk(whole).logits[0].log_softmax(-1)
            start = len(row.prompt_token_ids)
            for place, token in enumerate(sample.token_ids):
                nats -= logprobs[start + place - 1, token].item()
                tokens += 1
    found = gold_perplexity(policy, rows)
    assert (found.tokens, found.solutions, found.too_long) == (tokens, 3, 0) == (7, 3, 0)
    assert found.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_solutions_beyond_the_context_are_left_out_and_counted(random_policy):
    policy = random_policy(1)
    fits = PackedRow([2], [Sample(0, [5, 0])])
    found = gold_perplexity(policy, [fits, PackedRow([2] * policy.max_length, [Sample(0, [5])])])
    assert found == Perplexity(gold_perplexity(policy, [fits]).nats_per_token, 2, 1, too_long=1)
    assert gold_perplexity(policy, []) is None


def test_peak_memory_grows_and_stays():
    before = peak_memory_gib()["rss"]
    assert 0.01 < before < 100
    held = torch.ones(1 << 28, dtype=torch.uint8)
    held += 1
    del held
    assert peak_memory_gib()["rss"] >= before


@pytest.fixture
def own(tmp_path) -> str:
    """A reward with verdicts, some of them right."""
    (tmp_path / "own.py").write_text("def own(completions, **_): return [float(len(c) % 2) for c in completions]\n")
    return f"{tmp_path}/own.py:own"


def test_every_completion_is_kept_with_its_mark(trained, own, tmp_path):
    folder, _ = trained
    rewards = [{"function": own}]
    evaluation = evaluate_model(_config(folder, output=tmp_path / "out", rewards=rewards, **{"eval.samples": 2}), QUIET)
    rows = [json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]
    assert [(row["way"], row["sample"]) for row in rows] == [("sampled", 0), ("sampled", 1)] * 5 + [("greedy", 0)] * 5
    groups = [*evaluation.results["sampled"].groups, *evaluation.results["greedy"].groups]
    completions = [(group.prompt, completion) for group in groups for completion in group.completions]
    for row, (prompt, completion) in zip(rows, completions, strict=True):
        assert (row["prompt_id"], row["prompt"]) == (prompt.prompt_id, prompt.text)
        assert (row["completion"], row["tokens"]) == (completion.text, len(completion.token_ids))
        assert row["solution"] == prompt.columns["answer"]
        assert row["correct"] == (row["parts"]["own"] == 1.0)
        assert row["reward"] == row["parts"]["own"]
        assert row["failures"] == []
    assert sum(row["reward"] for row in rows[:10]) / 10 == pytest.approx(evaluation.results["sampled"].reward_mean)


def test_weights_that_are_not_finite_name_the_problem_and_the_other_completions_are_kept(random_policy, tmp_path):
    policy = random_policy(3)
    with torch.no_grad():
        policy.trunk.get_input_embeddings().weight[policy.tokenizer.encode("Z")[0]] = math.nan
    policy.save(tmp_path / "policy")
    problems = [{"question": q, "answer": "#### 5"} for q in ("how many", "Z apples", "3 + 4", "7 left?")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, problems)))
    given = {"data.name": str(tmp_path / "d.jsonl"), "rollout.prompts_per_shard": 2, "rollout.max_completion_tokens": 4}
    config = _config(tmp_path / "policy", **given, output=tmp_path / "out", **{"eval.greedy": False})
    with pytest.raises(RolloutError, match=r"(?s)not finite .* of 1 of 2 prompts, \['.*/1'\].*the other completions"):
        evaluate_model(config, QUIET)
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]
    assert kept == ["how many\n", "3 + 4\n", "7 left?\n"]


def test_a_folder_that_holds_completions_is_not_overwritten(trained, tmp_path, capsys):
    folder, _ = trained
    (tmp_path / "out/1").mkdir(parents=True)
    (tmp_path / "out/1/completions.jsonl").write_text("precious\n")
    assert main(["eval", str(folder), str(folder), "--threads", "1", "--output", str(tmp_path / "out")]) == 1
    assert f"output={tmp_path}/out/1 already holds completions.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out/completions.jsonl").exists()  # of the first policy
    (tmp_path / "completions.jsonl").write_text("precious\n")
    with pytest.raises(FileExistsError, match=r"already holds completions.jsonl; choose another folder"):
        evaluate_model(_config(folder, output=tmp_path), QUIET)
    assert (tmp_path / "completions.jsonl").read_text() == "precious\n"


def test_the_command_writes_a_table_of_80_columns_and_a_document(trained, own, tmp_path, shown):
    folder, _ = trained
    out = tmp_path / "e.json"
    words = ["eval", str(folder), "--threads", "1", "--eval.samples", "4", "--json", str(out)]
    words += ["--rewards", own]
    assert main([*words, "--output", str(tmp_path / "kept")]) == 0
    text = shown.export_text()
    table = [line for line in text.splitlines() if line[:1] in "┃│┏┡└"]
    assert table
    assert all(len(line) <= 80 for line in table)
    assert "…" not in "".join(table)
    for label in (
        *("accuracy", "correct", "pass@2", "pass@4", "majority of 4", "tokens per second"),
        *("tokens per forward", "drafts accepted, by depth", "fallback rate"),
    ):
        assert sum(label in line for line in table) == 1
    assert f"policy: {folder}/policy (the end of the run)" in text
    assert "perplexity of the gold solutions: " in text
    assert "peak memory: " in text

    document = json.loads(out.read_text())
    assert (document["model"], document["data"], document["split"], document["problems"]) == (
        *(str(folder), "word_problems", "held_out"),
        5,
    )
    assert document["policy"] == {"folder": f"{folder}/policy", "meaning": "the end of the run"}
    sampled, greedy = document["evaluations"]["sampled"], document["evaluations"]["greedy"]
    assert sampled["pass_at"].keys() == {"1", "2", "4"} == sampled["majority_at"].keys()
    assert sampled["pass_at"]["1"]["value"] == sampled["accuracy"]
    assert greedy["interval_95"][0] <= greedy["accuracy"] <= greedy["interval_95"][1]
    assert len(sampled["acceptance"]) == 2
    assert document["gold_perplexity"]["perplexity"] == pytest.approx(
        math.exp(document["gold_perplexity"]["nats_per_token"])
    )
    assert "Wilson" in document["interval_method"]
    assert document["rewards"][0]["sha256"]
    assert document["options"]["eval"]["samples"] == 4
    assert {"hardware", "versions", "command"} <= document["environment"].keys()


def test_an_evaluation_without_any_mark_fails(trained, tmp_path, shown):
    folder, _ = trained
    path = tmp_path / "mute.py"
    path.write_text("def mute(completions, **_):\n    return [None] * len(completions)\n")
    assert main(["eval", str(folder), "--threads", "1", "--rewards", f"[{{function: '{path}:mute'}}]"]) == 1
    text = shown.export_text()
    assert "5 abstained, 0 failed" in text
    assert "no completion has a mark: this evaluation says nothing about the policy" in text


def test_what_is_wrong_is_said_before_anything_is_sampled_or_loaded(trained, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr("grpo.cli.commands.eval.open_pool", lambda *_, **__: pytest.fail("sampling was prepared"))
    with pytest.raises(ValueError, match=r"5 prompts, the first of them 'word_problems/.* context of 256 with max_com"):
        evaluate_model(_config(folder, **{"rollout.max_completion_tokens": 250}), QUIET)
    monkeypatch.setattr("grpo.cli.commands.policy_in_use.load_found", lambda *_, **__: pytest.fail("it was loaded"))
    for given, message in (
        ({"data.name": "no_such.jsonl", "data.task_options": {}}, "no file or folder"),
        ({"data.template": "{nothing}"}, "asks for {nothing}"),
        ({"eval.split": "nowhere"}, "has no split 'nowhere'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            evaluate_model(_config(folder, **given), QUIET)
    with pytest.raises(PolicyError, match="there is no such folder"):
        evaluate_model(_config(folder, model="./nowhere"), QUIET)

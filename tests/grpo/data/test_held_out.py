"""Contract 16: held out means unseen, in every command that evaluates."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from grpo.cli.commands.eval import evaluate_model
from grpo.cli.commands.eval_report import as_json, show
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.cli.parse import main
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.data.trained_on import record_trained_on, trained_on
from grpo.sft import sft
from grpo.task.task import Task
from rewards.config.data import SourceOptions
from rewards.config.options import dump_yaml, load
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.leakage import in_held_out, problem_fingerprint

GSM8K = [RewardOptions(function="gsm8k")]
QUIET = Console(quiet=True)
A, B, C, D = (f"{i:012x}" for i in range(4))


def write_rows(path: Path, numbers) -> Path:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_of(data: dict, **options) -> Task:
    return Task(SourceOptions(**data), GSM8K, ScoringOptions(), **options)


def questions(examples) -> set[str]:
    return {example.question for example in examples}


@pytest.mark.parametrize("model", [TrainConfig, SftConfig, MtpConfig])
def test_contract_16_one_file_is_not_evaluated_on_the_rows_that_it_trains(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl", range(40))
    given = {"output_dir": str(tmp_path / "r"), "data.name": str(rows), "eval.limit": 20}
    with pytest.raises(ValueError, match=r"rows.jsonl is one file.*data.held_out: 0.1.*or give a folder with train"):
        Task.of(load(model, None, given))
    with Task.of(load(model, None, given | {"data.held_out": 0.3})) as task:
        assert task.held_out
        assert not questions(task.train) & questions(task.held_out)
        assert len(task.train) + len(task.held_out) <= 40


def test_contract_16_the_share_depends_on_content_alone(tmp_path):
    """Rows that are appended, moved or doubled move no other row to the other side; the run's seed does not either."""
    first = write_rows(tmp_path / "a.jsonl", range(200))
    second = write_rows(tmp_path / "b.jsonl", [*reversed(range(300)), *range(50)])
    with task_of({"name": str(first), "held_out": 0.2}, held_out=None) as task:
        train, held = questions(task.train), questions(task.held_out)
    assert 20 <= len(held) <= 60
    assert len(train) + len(held) == 200
    share = [in_held_out(problem_fingerprint(f"What is {i} + 1?"), 0.1) for i in range(10_000)]
    assert 850 < sum(share) < 1_150
    with task_of({"name": str(second), "held_out": 0.2}, held_out=None, seed=5) as task:
        assert questions(task.train) >= train
        assert questions(task.held_out) >= held
        assert not questions(task.train) & questions(task.held_out)


def test_contract_16_a_folder_without_a_test_file_can_be_split_too(tmp_path):
    write_rows(tmp_path / "train.jsonl", range(50))
    with task_of({"name": str(tmp_path), "held_out": 0.2}, held_out=5) as task:
        assert len(task.held_out) == 5
        assert not questions(task.train) & questions(task.held_out)
        assert len(task.train) + len(task.held_out) <= 50  # nor are held-out ones beyond the limit trained on


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"name": "word_problems", "held_out": 0.1}, {}, "word_problems has a held-out split of its own"),
        ({"held_out": 0.1}, {"held_out_split": "validation"}, "eval.split=validation names another split; drop one"),
        ({"held_out": 0.001}, {}, "holds out 0 of 20 examples; use another share, or more data"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(tmp_path, data, options, message):
    rows = write_rows(tmp_path / "rows.jsonl", range(20))
    with pytest.raises(ValueError, match=message):
        task_of({"name": str(rows)} | data, held_out=5, **options)


def test_contract_16_equal_rows_of_two_files_are_refused_by_name(tmp_path):
    write_rows(tmp_path / "train.jsonl", range(20))
    write_rows(tmp_path / "test.jsonl", range(17, 30))
    message = r"3 of 13 problems .* are trained on too .*/test/0 \(it is .*/train/17\).*data.held_out"
    with pytest.raises(ValueError, match=message):
        task_of({"name": str(tmp_path)}, held_out=None)


def test_what_counts_as_the_same_problem():
    for trained, evaluated, same in (
        ("What is 2 + 3?", "what is  2 + 3 ?", True),
        ("He said: “Two.”", 'He said "two"', True),
        ("What is 2 + 3?", "What is 2 - 3?", False),
        ("What is 2.5 + 3?", "What is 25 + 3?", False),
        ("What is 2 + 3?", "What is 2 + 3 + 1?", False),
    ):
        assert (problem_fingerprint(trained) == problem_fingerprint(evaluated)) == same, evaluated


def test_contract_16_a_problem_is_what_its_prompt_shows(tmp_path):
    """The same question about another text is another problem; the same text and question under other names is not."""
    for split, page in (("train", "Ada wrote it."), ("test", "Bob wrote it.")):
        row = {"question": "Who wrote it?", "context": page, "answer": "#### 1"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with task_of({"name": str(tmp_path), "template": "{context} {question}"}, held_out=None) as task:
        assert task.held_out
    with pytest.raises(ValueError, match="1 of 1 problems that are to be evaluated are trained on too"):
        task_of({"name": str(tmp_path)}, held_out=None)


def test_contract_16_no_prompt_shows_the_solution_of_an_evaluated_problem(tmp_path):
    write_rows(tmp_path / "train.jsonl", range(10))
    write_rows(tmp_path / "test.jsonl", [30, 1, 31])
    with pytest.raises(ValueError, match=r"1 of 3 .* are shown with their solutions as worked examples \(few_shot\)"):
        task_of({"name": str(tmp_path), "few_shot": 2}, train=False, held_out=None)
    with task_of({"name": str(tmp_path), "few_shot": 1}, train=False, held_out=None) as task:
        assert len(task.held_out) == 3
    rows = write_rows(tmp_path / "rows.jsonl", range(10))
    with pytest.raises(ValueError, match="is one file, and rows that are trained on or shown as worked examples"):
        task_of({"name": str(rows), "few_shot": 1}, train=False, held_out=None)


def test_a_training_problem_whose_solution_every_prompt_shows_is_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"few_shot=1: .* 1 of the others are the same problems: .*rows/3"):
        task_of({"name": str(rows), "few_shot": 1})


@pytest.fixture
def trained_run(tmp_path, micro_policy) -> Path:
    """Two supervised steps on a folder's training rows, from a saved policy."""
    write_rows(tmp_path / "data/train.jsonl", range(12))
    write_rows(tmp_path / "data/test.jsonl", range(20, 24))
    micro_policy().save(tmp_path / "base")
    given = {"output_dir": str(tmp_path / "run"), "model": str(tmp_path / "base"), "data.name": str(tmp_path / "data")}
    given |= {"steps": 2, "prompts_per_step": 2, "log.trackers": [], "data.few_shot": 1, "threads": 1}
    sft(load(SftConfig, None, given | {"eval.limit": 2, "rollout.max_completion_tokens": 4}))
    return tmp_path / "run"


def evaluate(model: Path, **given):
    options = {"rollout.max_completion_tokens": 4, "threads": 1, "rollout.draft_tokens": 0} | given
    return evaluate_model(load(EvalConfig, None, {"model": str(model)} | options), QUIET)


def test_contract_16_a_run_remembers_what_it_was_trained_on(trained_run, tmp_path, capsys):
    """Also a policy inside a run, a run that goes on from it, and a copy of the rows under another name."""
    assert problem_fingerprint("What is 0 + 1?") in trained_on(trained_run)  # a worked example
    copied = write_rows(tmp_path / "practice.jsonl", [50, 3, 51])
    for model in (trained_run, trained_run / "policy"):
        with pytest.raises(ValueError, match="1 of 3 .* trained on by the run that the model comes from: .*tice/1"):
            evaluate(model, data=str(copied))
    fresh = write_rows(tmp_path / "fresh.jsonl", [50, 51])
    assert evaluate(trained_run, data=str(fresh)).trained_on == 0

    found = evaluate(trained_run, data=str(copied), allow_trained_on=True)
    assert (found.trained_on, as_json(found)["trained_on"]) == (1, 1)
    show(found, Console(width=80))
    assert "NOT HELD OUT: the policy was trained on 1 of the 3 problems" in capsys.readouterr().out

    write_rows(tmp_path / "next/train.jsonl", range(60, 70))
    write_rows(tmp_path / "next/test.jsonl", [4, 80])
    given = {"output_dir": str(tmp_path / "r"), "model": str(trained_run / "policy"), "eval.limit": 2}
    config = load(TrainConfig, None, given | {"data.name": str(tmp_path / "next")})
    with pytest.raises(ValueError, match="1 of 2 .* were trained on by the run that the model comes from"):
        Task.of(config)


def test_contract_16_a_chain_of_runs_remembers_every_link(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "environment.json").write_text("{}")
    record_trained_on(tmp_path / "first", [A, B])
    record_trained_on(tmp_path / "second", {C, *trained_on(tmp_path / "first/policy")})
    assert trained_on(tmp_path / "second/checkpoints/step_000001") == {A, B, C}
    record_trained_on(tmp_path / "second", [D])  # resumed
    assert trained_on(tmp_path / "second") == {A, B, C, D}
    assert trained_on("tiny") == frozenset()
    (tmp_path / "second/trained_on.txt").write_bytes(b"00000000000a\n\xff\n")
    with pytest.raises(ValueError, match="second/trained_on.txt is damaged"):
        trained_on(tmp_path / "second")


def test_contract_16_a_policy_is_known_by_any_path_that_leads_to_it(tmp_path, monkeypatch):
    """Through a link, from inside of its folder, and where the disk behind a link holds it."""
    run, disk = tmp_path / "run", tmp_path / "disk/a/b"
    for folder in (run / "policy", run / "checkpoints/step_000001", disk):
        folder.mkdir(parents=True)
    (run / "environment.json").write_text("{}")
    record_trained_on(run, [A])
    (tmp_path / "latest").symlink_to(run / "policy")
    (tmp_path / "newest").symlink_to(run / "checkpoints/step_000001")
    (run / "best_policy").symlink_to(disk)
    for path in (tmp_path / "latest", tmp_path / "newest", run / "best_policy"):
        assert trained_on(path) == {A}
    for inside in ("policy", "checkpoints/step_000001"):
        monkeypatch.chdir(run / inside)
        assert trained_on(".") == {A}


def test_contract_16_a_run_that_held_out_a_share_is_evaluated_on_that_share(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", range(60))
    given = {"output_dir": str(tmp_path), "data.name": str(rows), "data.held_out": 0.25}
    run = load(TrainConfig, None, given | {"eval.limit": 50})
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    config = load(EvalConfig, None, defaults_of_run(tmp_path) | {"seed": 9})
    assert (config.data.held_out, config.data.split) == (0.25, "train")
    data = {"name": str(rows), "held_out": 0.25}
    with Task.of(run) as task, task_of(data, held_out=None) as again:
        assert questions(task.held_out) == questions(again.held_out)


def test_contract_16_a_share_by_other_columns_than_the_runs_is_refused(micro_policy, tmp_path, capsys):
    """It would be of other problems, most of which the run has learned from."""
    rows = write_rows(tmp_path / "rows.jsonl", range(60))
    micro_policy().save(tmp_path / "policy")
    given = {"output_dir": str(tmp_path), "data.name": str(rows), "data.held_out": 0.25}
    given["data.template"] = "{question}\n"
    (tmp_path / "config.yaml").write_text(dump_yaml(load(TrainConfig, None, given)))
    (tmp_path / "environment.json").write_text("{}")
    words = ["eval", str(tmp_path), "--threads", "1", "--eval.samples", "0", "--rollout.max_completion_tokens", "2"]
    assert main([*words, "--data.template", "{answer} {question}\n"]) == 1
    assert "shows the columns ['answer', 'question'], and the run's template ['question']" in capsys.readouterr().err
    assert main([*words, "--data.template", "Q: {question}\n"]) == 0


@pytest.mark.slow
def test_a_run_says_how_its_held_out_problems_are_set_apart(micro_policy, tmp_path, capsys):
    micro_policy().save(tmp_path / "base")
    given = {"output_dir": str(tmp_path / "words"), "model": str(tmp_path / "base"), "threads": 1, "log.trackers": []}
    given |= {"steps": 1, "prompts_per_step": 2, "eval.limit": 8, "rollout.max_completion_tokens": 4}
    sft(load(SftConfig, None, given | {"data.task_options.levels": [1, 2]}))
    said = capsys.readouterr().out
    assert "8 held-out problems: none is trained on" in said
    assert "8 share a template with training, 0 share their numbers" in " ".join(said.split())

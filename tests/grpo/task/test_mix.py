"""Several sources of data, with weights and rewards of their own, in a run."""

import json

import pytest
import torch
from safetensors import safe_open

from grpo.cli.config.inference import defaults_of_run
from grpo.cli.parse import main
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.run.records import read_metrics
from grpo.run.stop import Stopped
from grpo.task.check import check_plan, task_of
from grpo.train import train
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.config.options import ConfigError, dump_yaml, load
from rewards.records import read_rollouts

SHORT = {"warm_start.steps": 0, "steps": 3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of ten problems."""
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    lines = [{"question": f"{i} + {i} = ?", "answer": f"#### {2 * i}", "hint": "double it"} for i in range(10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def mixed(micro_config, letters, rows):
    """The options of a run with two sources, of which the second one has a reward of its own."""
    rewards = [{"function": letters, "name": "letters"}, {"function": letters, "name": "more", "weight": 0.5}]
    sources = [{"name": "word_problems", "weight": 2, "rewards": ["letters"]}, {"name": str(rows), "held_out": 0.3}]

    def config(folder, **given):
        return micro_config(folder, **SHORT | {"rewards": rewards, "data.sources": sources} | given)

    return config


def _sampled(folder, steps=3):
    return [read_rollouts(folder, step) for step in range(1, steps + 1)]


def _policy(folder):
    with safe_open(folder / "policy/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_contract_9_a_run_that_stops_in_mid_epoch_goes_on_to_the_same_bits(mixed, letters, tmp_path, capsys):
    train(mixed(tmp_path / "whole", **{"eval.limit": 2}))
    with pytest.raises(Stopped):
        train(mixed(tmp_path / "parts", **{"eval.limit": 2}), stop_after=2)
    train(mixed(tmp_path / "parts", **{"eval.limit": 2}), resume="auto")
    assert _sampled(tmp_path / "parts") == _sampled(tmp_path / "whole")
    for name, tensor in _policy(tmp_path / "whole").items():
        assert torch.equal(_policy(tmp_path / "parts")[name], tensor), name
    # Of 12 prompts two thirds come from the first source, and its rows have no mark of the other reward.
    lines = [line for step in _sampled(tmp_path / "whole") for line in step]
    first = {line["prompt_id"] for line in lines if line["prompt_id"].startswith("word_problems/")}
    of_first = [line for line in lines if line["prompt_id"] in first]
    assert len(of_first) == 8 * 4
    assert all(line["parts"]["more"] is None and line["parts"]["letters"] is not None for line in of_first)
    others = [line for line in lines if line["prompt_id"] not in first]
    assert all(line["reward"] == pytest.approx(1.5 * line["parts"]["letters"]) for line in others)
    # Metrics and the evaluation of each source.
    metrics = read_metrics(tmp_path / "whole")
    for line in metrics[1:]:
        groups = {label: line[f"source/{label}/groups"] for label in ("word_problems", "own.jsonl")}
        assert sum(groups.values()) == 4
        assert all(f"source/own.jsonl/{name}" in line for name in ("reward_mean", "tied", "length_mean"))
        means = [groups[label] * line[f"source/{label}/reward_mean"] for label in groups]
        assert sum(means) / 4 == pytest.approx(line["reward/mean"])
    assert {"eval/source/own.jsonl/reward_mean", "eval/source/word_problems/reward_mean"} <= metrics[0].keys()
    assert metrics[0]["eval/prompts"] == 4
    # Its completions can be scored again: each prompt has the columns of its source.
    again = replay(tmp_path / "whole", letters, ReplayConfig(steps=[1, 2]))
    assert ([step.completions for step in again.steps], again.changes, again.against) == ([16, 16], [], "letters")
    assert main(["eval", str(tmp_path / "whole"), "--threads", "1"]) == 1
    assert "data.name=word_problems + own.jsonl: the run has several sources of data" in capsys.readouterr().err


def test_one_source_in_a_list_gives_the_bits_that_it_gives_alone(micro_config, tmp_path):
    short = {"steps": 1, "warm_start.steps": 1}
    train(micro_config(tmp_path / "alone", **short))
    train(micro_config(tmp_path / "listed", **short, **{"data.sources": ["word_problems"]}))
    assert _sampled(tmp_path / "alone", 1) == _sampled(tmp_path / "listed", 1)
    for name, tensor in _policy(tmp_path / "alone").items():
        assert torch.equal(_policy(tmp_path / "listed")[name], tensor), name


def test_a_resume_refuses_a_changed_mix_by_name(mixed, rows, tmp_path):
    with pytest.raises(Stopped):
        train(mixed(tmp_path / "r"), stop_after=1)
    other = mixed(tmp_path / "r", **{"data.sources": [{"name": "word_problems", "weight": 3}, {"name": str(rows)}]})
    with pytest.raises(ValueError, match=r"data.sources"):
        train(other, resume="auto")
    with pytest.raises(ValueError, match=r"began with word_problems × 2, own.jsonl × 1, and now has word_problems × 3"):
        train(other, resume="auto", force=True)


def test_sources_are_written_in_short_and_read_the_same_again(tmp_path):
    options = {"output_dir": tmp_path, "data": ["gsm8k", "d/own data.jsonl"], "data.template": "chat"}
    config = load(TrainConfig, None, options)
    assert config.data.name == "gsm8k + own-data.jsonl"
    assert [(source.weight, source.template) for source in config.data.sources] == [(1, "chat")] * 2
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load(TrainConfig, tmp_path / "config.yaml", {}) == config
    assert TrainConfig(output_dir="r", data=[{"name": "gsm8k", "weight": 2}]).data.sources[0].weight == 2


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[{name: gsm8k, wieght: 2}]", "data.sources[0].wieght=2 (command line): no such option; did you mean"),
        ("[{name: gsm8k, weight: 0}]", "data.sources[0].weight=0 (command line): expected greater than 0"),
        ("[{weight: 2}]", "data.sources[0].name (command line): is required"),
        ("[gsm8k, gsm8k]", "data.sources: two are called 'gsm8k'; give one of them another label"),
    ],
)
def test_what_is_wrong_with_a_list_on_the_command_line_is_named(sources, words, capsys):
    assert main(["train", "--output_dir", "r", "--data", sources, "--print_config"]) == 2
    assert words in capsys.readouterr().err


def test_the_name_of_one_source_goes_with_no_list():
    with pytest.raises(ConfigError, match="data.name=gsm8k with data.sources"):
        TrainConfig(output_dir="r", data={"name": "gsm8k", "sources": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"data=\[\]: expected a mapping of options"):
        TrainConfig(output_dir="r", data=[])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"curriculum.shortest_share": 0.5},
            r"data.sources \(word_problems \+ own.jsonl\) with curriculum.shortest_share=0.5",
        ),
        ({"prompts_per_step": 30}, "takes up to 11 different prompts from the source own.jsonl, which has"),
        (
            {"data.sources": [{"name": "word_problems", "rewards": ["nobody"]}]},
            "no reward is called 'nobody'; the rewards",
        ),
        ({"data.sources": [{"name": "word_problems", "rewards": ["more"]}]}, "rewards: 'letters' scores no source"),
    ],
)
def test_what_a_mix_cannot_do_is_refused_by_name(mixed, tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        train(mixed(tmp_path / "r", **given))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", [SftConfig, MtpConfig])
def test_supervised_steps_and_the_draft_head_take_a_mix(mixed, tmp_path, command):
    whole = mixed(tmp_path / "r").model_dump()
    given = {name: whole[name] for name in ("model", "output_dir", "data")} | {"eval": {"limit": 2}}
    given |= {"prompts_per_step": 8, "rewards": whole["rewards"]}
    config = command.model_validate(given)
    check_plan(config)
    with task_of(config) as task:
        taken = task.stream(0, [*task.train[:12], *task.train[-6:]]).take(6)
    assert [example.example_id.startswith("word_problems/") for example in taken].count(True) == 4


def test_contract_16_a_problem_that_another_source_trains_on_is_not_held_out(mixed, rows, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows.read_text())
    sources = [{"name": str(rows), "held_out": 0.3}, {"name": str(copy)}]
    with pytest.raises(ValueError, match=r"held out of the source own.jsonl, and the source copy.jsonl trains on them"):
        task_of(mixed(tmp_path / "r", **{"data.sources": sources, "eval.limit": 3, "prompts_per_step": 2}))
    sources = [{"name": str(rows)}, {"name": str(rows), "label": "again"}]
    with pytest.raises(ValueError, match=r"data.sources: again has .*own/0, and so has a source before it"):
        task_of(mixed(tmp_path / "r", **{"data.sources": sources}))


def test_a_dry_run_shows_the_mix_and_eval_asks_for_one_source(mixed, rows, tmp_path, capsys):
    config = mixed(tmp_path / "r", **{"eval.limit": 2})
    (tmp_path / "r.yaml").write_text(dump_yaml(config))
    assert main(["train", str(tmp_path / "r.yaml"), "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "66.7% of the prompts: 24 examples, an epoch of 9.0 steps; 2 held out; rewards: letters" in shown
    assert "rewards: letters, more" in shown
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(config))
    brought = defaults_of_run(tmp_path / "run", str(rows))
    assert (brought["data"]["held_out"], len(brought["rewards"])) == (0.3, 2)
    assert [reward["name"] for reward in defaults_of_run(tmp_path / "run", "word_problems")["rewards"]] == ["letters"]

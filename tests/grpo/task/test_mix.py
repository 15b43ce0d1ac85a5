"""Several sources of data, with weights and rewards of their own, in a run."""

import json
import shutil
import textwrap

import pytest
import torch
from safetensors import safe_open

from grpo.cli.config.inference import defaults_of_run
from grpo.cli.parse import main
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.data.mix import MixedStream
from grpo.data.prompts import PromptStream
from grpo.run.stop import Stopped
from grpo.task.check import check_plan, task_of
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.config.data import names_of
from rewards.config.options import ConfigError, dump_yaml, load
from rewards.config.yaml_file import parse_yaml
from rewards.data.examples import Example
from rewards.records import read_rollouts

WORDS = {"name": "word_problems", "task_options": {"levels": [1]}, "limit": 24}
SHORT = {"sft.steps": 0, "steps": 3, "rollout.max_completion_tokens": 6, "eval.limit": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of ten problems."""
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    lines = [{"question": f"{i} + {i} = ?", "answer": f"#### {2 * i}", "hint": "double it"} for i in range(10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def mixed(micro_config, letters, rows):
    """The options of a run with two sources, of which the second one has a reward of its own."""
    rewards = [{"function": letters, "name": "letters"}, {"function": letters, "name": "more", "weight": 0.5}]
    sources = [WORDS | {"weight": 2, "rewards": ["letters"]}, {"name": str(rows), "held_out": 0.3}]

    def config(folder, **given):
        return micro_config(folder, **SHORT | {"rewards": rewards, "data": sources} | given)

    return config


def _sampled(folder, steps=3):
    return [read_rollouts(folder, step) for step in range(1, steps + 1)]


def _policy(folder):
    with safe_open(folder / "policy/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_contract_9_a_run_that_stops_in_mid_epoch_goes_on_to_the_same_bits(mixed, letters, rows, tmp_path, capsys):
    """And not with another mix, which is named."""
    train(mixed(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(mixed(tmp_path / "parts"), stop_after=2)
    other = mixed(tmp_path / "parts", data=[WORDS | {"weight": 3}, {"name": str(rows)}])
    with pytest.raises(ValueError, match=r"  data: "):
        train(other, resume="auto")
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    other = other.model_copy(update={"output_dir": tmp_path / "other"})
    with pytest.raises(ValueError, match=r"began with word_problems × 2, own.jsonl × 1, and now has word_problems × 3"):
        train(other, resume="auto", force=True)
    train(mixed(tmp_path / "parts"), resume="auto")
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
        assert all(f"source/own.jsonl/{name}" in line for name in ("reward_mean", "zero_variance", "length_mean"))
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
    short = {"steps": 1, "sft.steps": 1, "sft.batch_size": 2, "rollout.max_completion_tokens": 6}
    train(micro_config(tmp_path / "alone", **short))
    train(micro_config(tmp_path / "listed", **short, data=[WORDS]))
    assert _sampled(tmp_path / "alone", 1) == _sampled(tmp_path / "listed", 1)
    for name, tensor in _policy(tmp_path / "alone").items():
        assert torch.equal(_policy(tmp_path / "listed")[name], tensor), name


def test_sources_are_written_in_short_and_read_the_same_again(tmp_path):
    config = load(TrainConfig, None, {"output_dir": tmp_path, "data": ["gsm8k", "d/own data.jsonl"]})
    assert names_of(config.data) == "gsm8k + own-data.jsonl"
    assert [source.weight for source in config.data] == [1, 1]
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load(TrainConfig, tmp_path / "config.yaml", {}) == config
    with pytest.raises(ConfigError, match=r"data.limit=3 .command line.: data is a list of 2; change it in the file"):
        load(TrainConfig, tmp_path / "config.yaml", {"data.limit": 3})
    one = load(TrainConfig, None, {"output_dir": tmp_path, "data": {"name": "gsm8k"}, "data.limit": 3})
    assert parse_yaml(dump_yaml(one))["data"]["limit"] == 3  # one source without a list, as version 0.2 wrote it
    forms = [[{"name": "gsm8k"}], ["gsm8k"], "gsm8k"]
    assert {TrainConfig(output_dir=tmp_path, data=form).data[0].name for form in forms} == {"gsm8k"}


def test_the_sources_of_version_0_2_are_read(tmp_path, caplog):
    """What a source did not say was as `data` said."""
    older = """
        output_dir: r
        data:
          name: word_problems + own.jsonl
          template: chat
          levels: [3]
          held_out_seed: 0
          sources:
            - name: word_problems
            - {name: own.jsonl, template: "{question}", weight: 2, levels: [3], system_prompt: null}
    """
    (tmp_path / "config.yaml").write_text(textwrap.dedent(older))
    words, mine = load(TrainConfig, tmp_path / "config.yaml", {}).data
    assert (words.template, words.task_options) == ("chat", {"levels": [3]})
    assert (mine.template, mine.task_options, mine.weight) == ("{question}", {}, 2)
    assert "data.sources is data, a list" in caplog.text
    (tmp_path / "one.yaml").write_text("output_dir: r\ndata: {name: gsm8k, limit: 3, sources: []}\n")
    assert load(TrainConfig, tmp_path / "one.yaml", {}).data[0].limit == 3


def test_an_order_that_version_0_2_recorded_for_a_list_of_one_source_goes_on():
    examples = [Example(str(i), f"{i} + 1 = ?", str(i + 1)) for i in range(9)]
    mixed, alone = MixedStream({"words": examples}, {"words": 1.0}), PromptStream(examples)
    mixed.take_examples(4)
    alone.load_state_dict(mixed.state_dict())
    assert alone.take_examples(4) == mixed.take_examples(4)


def test_what_is_wrong_with_a_list_on_the_command_line_is_named(capsys):
    for sources, words in (
        ("[{name: gsm8k, wieght: 2}, a]", "data[0].wieght=2 (command line): no such option; did you mean"),
        ("[{name: gsm8k, weight: 0}, a]", "data[0].weight=0 (command line): expected greater than 0"),
        ("[{weight: 2}, a]", "data[0].name is required: there are several sources"),
        ("[gsm8k, gsm8k]", "data: two sources are called 'gsm8k'; give one of them another label"),
    ):
        assert main(["train", "--output_dir", "r", "--data", sources, "--print_config"]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="data: there is no source"):
        TrainConfig(output_dir="r", data=[])
    sources = [{"name": "a", "chat_template_kwargs": {"enable_thinking": False}}, {"name": "b"}]
    with pytest.raises(ConfigError, match="data: chat_template_kwargs belongs to the whole run; give every source"):
        TrainConfig(output_dir="r", data=sources)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"curriculum.shortest_share": 0.5}, "the weights would not hold"),
        ({"prompts_per_step": 30}, "takes up to 11 different prompts from the source own.jsonl, which has"),
        ({"data": [WORDS | {"rewards": ["nobody"]}]}, "no reward is called 'nobody'; the rewards"),
        ({"data": [WORDS | {"rewards": ["more"]}]}, "rewards: 'letters' scores no source"),
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
        taken = task.stream(0, [*task.train[:12], *task.train[-6:]]).take_examples(6)
    assert [example.example_id.startswith("word_problems/") for example in taken].count(True) == 4


def test_contract_16_a_problem_that_another_source_trains_on_is_not_held_out(mixed, rows, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows.read_text())
    sources = [{"name": str(rows), "held_out": 0.3}, {"name": str(copy)}]
    with pytest.raises(ValueError, match=r"held out of the source own.jsonl, and the source copy.jsonl trains on them"):
        task_of(mixed(tmp_path / "r", **{"data": sources, "eval.limit": 3, "prompts_per_step": 2}))
    sources = [{"name": str(rows)}, {"name": str(rows), "label": "again"}]
    with pytest.raises(ValueError, match=r"data: again has .*own/0, and so has a source before it"):
        task_of(mixed(tmp_path / "r", data=sources))


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

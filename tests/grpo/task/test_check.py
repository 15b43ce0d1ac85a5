"""What a run refuses before its first step, `--dry_run` refuses too, in the same words (contract 20)."""

from __future__ import annotations

import json
import re

import pytest
import zoo
from safetensors.torch import load_file, save_file

from grpo.cli.commands import check, summary
from grpo.cli.launch import launch
from grpo.cli.mtp import mtp
from grpo.cli.parse import main
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig
from grpo.sft import sft
from grpo.train import train
from policies.checkpoint import note_own_code
from policies.policy import PolicyError
from policies.presets import PRESETS
from rewards.config.options import load
from rewards.config.problems import command_line

OWN = """
from grpo import advantage, objective

@advantage
def two(rewards_PG, steps): return rewards_PG

@advantage
def breaks(rewards_PG): return rewards_PG.sume()

@objective(aggregate="dapoo")
def unknown(ratio, advantages, policy_logprobs, options): return ratio * advantages

@objective(aggregate="dapo")
def three(ratio, advantages, policy_logprobs): return ratio * advantages

@objective(aggregate="dapo")
def scalar(ratio, advantages, policy_logprobs, options): return (ratio * advantages).mean()
"""


def both(config, *runs, dry_run=summary.dry_run, **flags) -> str:
    """What the plan says and each of these runs, which is the same."""
    said = set()
    for refuse in (dry_run, *runs):
        with command_line(), pytest.raises((ValueError, OSError, RuntimeError)) as error:
            refuse(config, **flags)
        said.add(str(error.value))
    [words] = said
    return words


def test_contract_20_the_plan_refuses_what_the_run_refuses(micro_config, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    usual = {"sft.steps": 0, "rollout.group_size": 2}
    for given, message in (
        ({"log.trackers": ["swanlab"]}, "log.trackers: 'swanlab' is not installed"),
        ({"rollout.max_completion_tokens": 100_000}, "pass the policy's context of 256 with max_completion_tokens="),
        ({"loss.advantage": f"{own}:two"}, "two(rewards_PG, steps) is called with rewards_PG, and missing"),
        ({"loss.advantage": f"{own}:breaks"}, "own.py:breaks failed when it was tried: AttributeError: 'Tensor'"),
        ({"loss.loss_type": f"{own}:unknown"}, "aggregate='dapoo', which is no loss; use one of grpo, dr_grpo, dapo"),
        ({"loss.loss_type": f"{own}:three"}, "called with ratio, advantages, policy_logprobs, options, and too many"),
        ({"loss.loss_type": f"{own}:scalar"}, "own.py:scalar gave []; give a tensor [2, 2]"),
        ({"lora.targets": ["qproj"]}, "lora.targets: 'qproj' matches no module"),
    ):
        config = micro_config(tmp_path / "r", **usual | given)
        assert message in both(config, launch)
    assert not [path for path in (tmp_path / "r").rglob("*") if path.suffix == ".safetensors"]  # nothing was learned


def test_what_only_a_deepseek_v3_policy_can_do(micro_config, hf_policy, tmp_path):
    replay = {"learner.routing_replay": True}, "experts are recorded of DeepSeek-V3 policies only; drop it"
    balance = {"balance.entropy_weight": 0.1}, "balance.entropy_weight=0.1, but this policy has no routed experts"
    for kind, refused in (("llama", [balance, replay]), ("mixtral", [replay])):
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
        hf_policy(kind, **experts).save(tmp_path / kind)
        for given, message in refused:
            more = {"sft.steps": 0, "rollout.draft_tokens": 0, "mtp.loss_weight": 0, **given}
            config = micro_config(tmp_path / "r", model=str(tmp_path / kind), **more)
            words = both(config, train)
            assert message in words
            assert "nothing to be replayed" not in words


def test_dynamic_heads_are_replayed_where_there_are_no_experts(micro_config, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "dense", PRESETS["micro"] | {"first_k_dense_replace": 2})
    given = {"sft.steps": 0, "learner.routing_replay": True, "active_heads": 0.5}
    summary.dry_run(micro_config(tmp_path / "r", model="dense", **given))
    none = micro_config(tmp_path / "r", model="dense", **given | {"active_heads": None})
    assert "(no experts or dynamic heads)" in both(none, train)


def test_damaged_weights_are_found_without_loading_them(micro_config, micro_policy, tmp_path):
    micro_policy().save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    config = micro_config(tmp_path / "r", model=str(tmp_path / "m"), **{"sft.steps": 0})
    assert "is damaged" in both(config, train)
    file.unlink()
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert summary.dry_run(config).facts  # a shape alone can be planned with
    with pytest.raises(PolicyError):
        train(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_contract_20_an_lm_head_that_is_not_the_configurations_is_refused_in_the_plan(
    micro_config, micro_policy, hf_policy, tmp_path, kind, tied
):
    """A tied model whose files hold another LM head, and a model of its own LM head whose files hold none."""
    folder = tmp_path / "policy"
    (micro_policy(4) if kind == "deepseek_v3" else hf_policy(kind)).save(folder)
    file, weights = folder / "config.json", load_file(folder / "model.safetensors")
    given = {"rollout.draft_tokens": 0, "mtp.loss_weight": 0, "sft.steps": 0}
    config = micro_config(tmp_path / "r", model=str(folder), **given)
    if tied:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
        assert "hold an LM head that differs from the embedding" in both(config, train)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        summary.dry_run(config)
    else:
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "lacks the tensors lm_head.weight" in both(config, train)
    assert not (tmp_path / "r").exists()


def test_code_of_a_checkpoint_is_noted_in_the_same_words_by_the_plan_the_run_and_check(
    micro_config, hf_policy, tmp_path, caplog, monkeypatch
):
    folder = tmp_path / "with_code"
    hf_policy("llama").save(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    given = {"rollout.draft_tokens": 0, "mtp.loss_weight": 0, "sft.steps": 0, "steps": 1}
    config = micro_config(tmp_path / "r", model=str(folder), **given)
    said = []
    for act in (summary.dry_run, train):
        note_own_code.cache_clear()
        caplog.clear()
        act(config)
        said += [record.getMessage() for record in caplog.records if "auto_map" in record.getMessage()]
    monkeypatch.setattr(check, "examine", lambda *_: [])
    [row] = [row for row in check.check(str(folder)) if row.name == "own code"]
    assert said == [row.note, row.note]
    assert row.wrong == []
    assert "which is never run: transformers' own llama computes it" in row.note


STOCK = {"rollout.draft_tokens": 0, "mtp.loss_weight": 0, "sft.steps": 0, "steps": 1}


def test_the_plan_and_the_run_say_which_path_a_model_takes_and_why(micro_config, tmp_path, capsys):
    config = micro_config(tmp_path / "r", model=str(zoo.folder(tmp_path / "m", "bloom")), **STOCK)
    words = (
        "sampled by transformers' cache; every completion is read with its prompt (not 'our cache': ValueError: its "
        "layers do not attend through the attention interface of transformers; not 'a prompt is read once"
    )
    assert words in summary.dry_run(config).facts["sampling and learning"]
    train(config)
    assert words in " ".join(capsys.readouterr().out.split())


def test_contract_20_a_type_that_is_refused_when_it_is_loaded_is_refused_in_the_plan(micro_config, tmp_path):
    config = micro_config(tmp_path / "r", model=str(zoo.folder(tmp_path / "m", "cpmant")), **STOCK)
    said = []
    for refuse in (summary.dry_run, train):
        with pytest.raises(PolicyError) as error:
            refuse(config)
        said.append(re.sub(r"by [\d.e+]+", "by N", str(error.value)))
    assert said[0] == said[1]
    assert "a model of type 'cpmant' cannot be trained here: the sampler fails in every way" in said[0]


def test_an_lm_head_of_another_name_is_not_missing(micro_config, hf_policy, tmp_path):
    """GPT-NeoX's files call it embed_out."""
    hf_policy("gpt_neox").save(tmp_path / "policy")
    assert "lm_head.weight" not in load_file(tmp_path / "policy/model.safetensors")
    given = {"rollout.draft_tokens": 0, "mtp.loss_weight": 0, "sft.steps": 0}
    summary.dry_run(micro_config(tmp_path / "r", model=str(tmp_path / "policy"), **given))


def test_the_plan_of_a_resume_refuses_other_rewards(micro_config, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def score(completions): return [len(c) for c in completions]\n")
    given = {"steps": 1, "sft.steps": 1, "rollout.max_completion_tokens": 4}
    config = micro_config(tmp_path / "r", rewards=[{"function": f"{reward}:score"}], **given)
    train(config)
    reward.write_text("def score(completions): return [1.0 for c in completions]\n")
    assert "holds another reward function 'score'" in both(config, train, resume="auto")
    summary.dry_run(config, resume="auto", force=True)
    begun = micro_config(tmp_path / "next", model=str(tmp_path / "r" / "checkpoints" / "step_000001"))
    summary.dry_run(begun)  # the checkpoint's base is the SFT stage's policy


def test_a_checkpoint_that_continues_a_preset_is_refused_in_the_plan(micro_config, tmp_path):
    given = {"steps": 1, "sft.steps": 0, "rollout.max_completion_tokens": 4}
    train(micro_config(tmp_path / "r", **given))
    config = micro_config(tmp_path / "next", model=str(tmp_path / "r" / "checkpoints" / "step_000001"))
    assert "continues the preset" in both(config, train)


def test_model_data_and_reward_are_refused_together(micro_config, tmp_path, capsys):
    """docs/commands.md: all of them at once. Also the data and the reward where the model is there."""
    wrong = {"data.name": str(tmp_path / "nowhere.jsonl"), "rewards": [{"function": "nowhere.py:score"}]}
    config = micro_config(tmp_path / "r", model="./nowhere", **wrong, **{"log.trackers": ["swanlab"]})
    words = both(config, launch, train)
    head, *lines = words.split("\n  ")
    assert head == "4 things are wrong with this run:"
    for key, line in zip(("log.trackers", "model='./nowhere'", "there is no file", "nowhere.py"), lines, strict=True):
        assert key in line
    two = micro_config(tmp_path / "r", **wrong)
    assert both(two, train).startswith("2 things are wrong with this run:")
    args = ["train", "--model", "./nowhere", "--output_dir", str(tmp_path / "r"), "--data.name", wrong["data.name"]]
    codes = [main([*args, *more]) for more in ([], ["--dry_run"])]
    assert codes == [1, 1]
    said = capsys.readouterr().err.split("quartet: ")[1:]
    assert said[0] == said[1]
    assert said[0].count("\n  ") == 2


def test_a_supervised_run_and_one_of_the_head_are_checked_alike(micro_preset, random_policy, tmp_path):
    long = {"model": micro_preset, "output_dir": tmp_path / "r", "rollout.max_completion_tokens": 100_000}
    config = load(SftConfig, None, {**long, "data.task_options.levels": [1], "data.limit": 24, "eval.limit": 2})
    assert "pass the policy's context" in both(config, sft)
    given = {"output_dir": tmp_path / "r", "data.limit": 24, "data.task_options.levels": [1]}
    head = load(MtpConfig, None, {"model": micro_preset, **given, "mtp.solutions": 23, "eval.limit": 2})
    assert "mtp.solutions=23, but" in both(head, mtp, dry_run=summary.mtp_dry_run)


def test_a_layout_that_does_not_fit_the_processes_is_refused_in_the_plan(micro_config, tmp_path):
    odd = micro_config(tmp_path / "r", **{"learner.workers": 3, "learner.parallel.fsdp": 2})
    with pytest.raises(ValueError, match="learner.parallel: fsdp=2, tensor=1 need a multiple of 2 processes"):
        summary.dry_run(odd)


def test_contract_20_weights_that_stay_packed_are_refused_without_them(micro_config, hf_policy, tmp_path):
    hf_policy("llama").save(tmp_path / "llama")
    file = tmp_path / "llama/config.json"
    packing = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | packing))
    given = {"rollout.draft_tokens": 0, "sft.steps": 0, "mtp.depth": 4}
    config = micro_config(tmp_path / "run", model=str(tmp_path / "llama"), **given)
    said = "its weights stay packed (bitsandbytes), and such a policy cannot be saved"
    assert said in both(config, train)
    assert not (tmp_path / "run").exists()


def test_contract_20_a_dry_run_of_mtp_refuses_the_flags_that_the_run_refuses(micro_policy, tmp_path):
    micro_policy().save(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "output_dir": tmp_path / "head", "steps": 2, "threads": 1}
    config = load(MtpConfig, None, given)
    for flags in ({"force": True}, {"resume": "nowhere"}):
        both(config, mtp, dry_run=summary.mtp_dry_run, **flags)

"""Whole runs of a micro policy: what they write, what they refuse, and what a failure leaves behind."""

import json
import math
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.evaluation.held_out import HeldOut
from grpo.learner.terms import draft_head
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.update import NonFiniteStep
from grpo.run import checkpoint, resume
from grpo.run.stop import Stopped
from grpo.steps.ahead import Batches
from grpo.steps.loop import Run
from grpo.train import train
from policies.conversion.dense import convert_checkpoint
from policies.layout import frozen_parameter_names
from policies.policy import Policy, PolicyError
from review.readers.run_folder import check, read_metrics
from rewards.config.yaml_file import parse_yaml
from rewards.protocol import RewardError
from rewards.records import read_rollouts
from rollout.cost_table import CostTable
from rollout.decoding.engine import Engine

EVERY_STEP = {
    *("reward/mean", "reward/std", "reward/part/letters", "reward/abstained", "reward/errors"),
    *("group/zero_variance", "group/dropped"),
    *("completion/tokens", "completion/length_mean", "completion/length_max", "completion/truncated"),
    *("loss/policy", "policy/entropy", "policy/clip_fraction", "policy/ratio_mean"),
    *("mismatch/logprob_abs_mean", "mismatch/kl"),
    *("draft/acceptance_depth_1", "draft/acceptance_depth_2", "draft/tokens_per_forward", "draft/fallback_rate"),
    *("moe/load_min", "moe/load_max", "moe/max_violation"),
    *("learner/learning_rate", "learner/grad_norm", "learner/updates"),
    *("time/step", "time/rollout", "time/reward", "time/learn", "time/sync"),
    *("speed/completion_tokens_per_second", "memory/rss_gib"),
}


QUICK = {"sft.steps": 0}


def _events(folder: Path, kind: str) -> list[dict]:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]


def _sampled(folder: Path, steps=(1, 2, 3)) -> list[list[list[int]]]:
    return [[line["token_ids"] for line in read_rollouts(folder, step)] for step in steps]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return Policy.load(folder).state_dict()


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    """The folder of a run with an SFT stage, evaluation and TensorBoard."""
    folder = tmp_path_factory.mktemp("run") / "micro"
    results = train(micro_config(folder, **{"eval.limit": 6, "eval.every": 2, "log.trackers": None}))
    assert results.folder == folder
    assert list(results.evaluations) == [
        f"{when} GRPO, {how}" for when in ("before", "after") for how in ("sampled", "greedy")
    ]
    assert all(evaluation.prompts == 6 for evaluation in results.evaluations.values())
    return folder


@pytest.fixture(scope="module")
def as_run(run, micro_config):
    """`as_run(folder, **options)`: a run that begins where the SFT stage of `run` ended."""
    return lambda folder, **given: micro_config(folder, **QUICK | {"model": str(run / "warm_start")} | given)


def test_a_run_leaves_a_complete_folder(run, micro_config):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "events.jsonl"}
    assert names >= {"rollouts", "warm_start", "checkpoints", "policy", "tensorboard"}
    assert not [path for path in run.rglob("*") if ".partial" in path.name]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step_{i:06d}" for i in (1, 2, 3)]
    suffixes = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    config = parse_yaml((run / "config.yaml").read_text())
    assert config["rollout"]["group_size"] == 4
    assert config["loss"]["epsilon"] == 0.2  # the effective configuration, defaults included
    environment = json.loads((run / "environment.json").read_text())
    assert {"hardware", "versions", "command", "threads"} <= environment.keys()
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))


def test_metrics_are_complete_finite_and_documented(run):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line.keys() >= EVERY_STEP
        assert "loss/mtp" in line
    for line in (lines[0], lines[2], lines[3]):  # eval.every: 2
        assert {"eval/reward_mean", "eval/reward_mean_greedy", "eval/prompts", "time/evaluate"} <= line.keys()
    assert "eval/reward_mean" not in lines[1]
    for line in lines:
        for name, value in line.items():
            assert math.isfinite(value), name
            assert name == "step" or check(name)
    assert all(line["learner/updates"] == 1 for line in lines[1:])
    for line in lines[1:]:  # contract 5 from outside: a step that learned from stale weights would show it here
        assert line["mismatch/logprob_abs_mean"] < 1e-4
        assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert line["mismatch/kl"] < 1e-8
    assert not _events(run, "undocumented_metric")


def test_rollouts_hold_what_was_sampled_and_what_it_was_worth(run):
    for step in (1, 2, 3):
        lines = read_rollouts(run, step)
        assert len(lines) == 16
        for start in range(0, 16, 4):
            group = lines[start : start + 4]
            assert len({line["prompt_id"] for line in group}) == 1
            assert [line["sample"] for line in group] == [0, 1, 2, 3]
            assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-5)
            best = max(group, key=lambda line: line["reward"])
            assert best["advantage"] == max(line["advantage"] for line in group)
        for line in lines:
            assert len(line["token_ids"]) == len(line["logprobs"]) <= 10
            assert line["reward"] == sum(c.isalpha() for c in line["text"]) / 20
            assert line["policy_version"] == step - 1  # sampled with the weights of the step before
            assert line["finish_reason"] in ("stop", "length")
    mean = sum(line["reward"] for line in read_rollouts(run, 1)) / 16
    assert read_metrics(run)[1]["reward/mean"] == pytest.approx(mean)


def test_contract_2_stock_transformers_gives_the_warm_policys_samples_their_logprobs(run):
    """The SFT stage loads in stock transformers, and is the policy that step 1 sampled from."""
    model = AutoModelForCausalLM.from_pretrained(run / "warm_start")
    tokenizer = AutoTokenizer.from_pretrained(run / "warm_start")
    for line in read_rollouts(run, 1)[:6]:
        prompt = tokenizer.encode(line["prompt"])
        ids = torch.tensor([prompt + line["token_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(line["logprobs"]), expected, rtol=0, atol=1e-4)


def test_the_trained_policy_loads_in_stock_transformers_and_has_moved(run):
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    warm = AutoModelForCausalLM.from_pretrained(run / "warm_start")
    assert sum((p - q).abs().sum().item() for p, q in zip(model.parameters(), warm.parameters(), strict=True)) > 1
    trained, before = _weights(run / "policy"), _weights(run / "warm_start")
    assert trained.keys() == before.keys()
    assert any(name.startswith("mtp.") and not torch.equal(t, before[name]) for name, t in trained.items())
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    assert tokenizer.decode(tokenizer.encode("How many pens?")) == "How many pens?"


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_bits_with_adapters(micro_config, tmp_path):
    """peft draws the first values of the adapters: `seed` must reach them, too."""
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        train(micro_config(tmp_path / name, steps=1, **{"lora.rank": 4, "sft.steps": 1}))
    first, second = _weights(tmp_path / "a/policy"), _weights(tmp_path / "b/policy")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    warm = _weights(tmp_path / "a/warm_start")
    assert not all(torch.equal(tensor, warm[name]) for name, tensor in first.items() if name.startswith("trunk."))


def test_another_seed_gives_other_samples(run, as_run, tmp_path):
    train(as_run(tmp_path / "other", seed=1, steps=1))
    assert _sampled(tmp_path / "other", [1]) != _sampled(run, [1])


def test_contract_3_drafts_change_no_token(run, as_run, tmp_path):
    train(as_run(tmp_path / "plain", **{"rollout.draft_tokens": 0}))
    assert _sampled(tmp_path / "plain") == _sampled(run)
    assert all("draft/acceptance_depth_1" not in line for line in read_metrics(tmp_path / "plain"))


def test_a_second_run_into_the_same_folder_is_refused(run, micro_config):
    before = (run / "metrics.jsonl").read_bytes()
    processes = len(psutil.Process().children())
    with pytest.raises(
        FileExistsError, match='already holds a run; choose another output_dir, go on with resume="auto"'
    ):
        train(micro_config(run))
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(psutil.Process().children()) == processes  # the processes that score are gone


def test_a_run_that_never_took_a_step_leaves_no_stale_sft_stage(micro_config, tmp_path, monkeypatch):
    """Interrupted between SFT stage and step 1, then started anew with another configuration."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "start_sampling", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(micro_config(tmp_path / "r", **{"sft.steps": 1}))
    first = _weights(tmp_path / "r/warm_start")
    train(micro_config(tmp_path / "r", steps=1, **{"sft.steps": 2}))
    assert not torch.equal(_weights(tmp_path / "r/warm_start")["trunk.lm_head.weight"], first["trunk.lm_head.weight"])


def test_what_can_be_refused_is_refused_before_the_folder_is_touched(micro_config, tmp_path):
    processes = len(psutil.Process().children())
    for given, error, message in (
        ({"model": "mikro"}, PolicyError, "model='mikro': there is no such folder; did you mean the preset 'micro'"),
        ({"prompts_per_step": 25}, ValueError, "prompts_per_step=25, but there are 24 training examples"),
        ({"rewards": [{"function": "gsm8q"}]}, RewardError, "gsm8k"),
        ({"data.split": "held_out"}, ValueError, "is for evaluation and must not be trained on"),
        ({"log.trackers": ["wandbb"]}, ValueError, "wandbb"),
    ):
        with pytest.raises(error, match=message):
            train(micro_config(tmp_path / "r", **given))
        assert not (tmp_path / "r").exists()
        assert len(psutil.Process().children()) == processes


# ---- rewards of the user's own --------------------------------------------------------------------------------------

OWN = """
def long(completions, **_):
    return [float(len(completion)) for completion in completions]

def picky(prompts, completions, question, **_):
    assert all(prompt.startswith(question[i]) for i, prompt in enumerate(prompts))
    for completion in completions:
        if completion == FAILS_ON:
            raise ValueError("cannot read this one")
    return [0.5] * len(completions)

def equal(completions, **_):
    return [1.0] * len(completions)
"""


@pytest.fixture
def own(tmp_path, run) -> str:
    """A file of rewards; `picky` fails on one completion of the first step of `run`."""
    victim = read_rollouts(run, 1)[5]["text"]
    assert [line["text"] for line in read_rollouts(run, 1)].count(victim) == 1
    path = tmp_path / "own.py"
    path.write_text(f"FAILS_ON = {victim!r}\n{OWN}")
    return str(path)


def test_several_weighted_rewards_and_one_from_a_file(run, own, as_run, letters, tmp_path):
    rewards = [
        {"function": f"{own}:long", "weight": 0.1, "name": "size"},
        {"function": letters, "weight": 2.0},
        {"function": "length_penalty", "arguments": {"target": 5, "per_token": 0.5}},
    ]
    train(as_run(tmp_path / "r", steps=1, rewards=rewards))
    for line, former in zip(read_rollouts(tmp_path / "r", 1), read_rollouts(run, 1), strict=True):
        parts = line["parts"]
        assert list(parts) == ["size", "letters", "length_penalty"]
        assert parts["size"] == len(line["text"])
        assert line["text"] == former["text"]
        assert parts["letters"] == former["reward"]
        assert line["reward"] == pytest.approx(0.1 * parts["size"] + 2 * parts["letters"] + parts["length_penalty"])
    metrics = read_metrics(tmp_path / "r")[0]
    assert {"reward/part/size", "reward/part/letters", "reward/part/length_penalty"} <= metrics.keys()


def test_contract_6_a_failing_reward_aborts_naming_function_prompt_and_sample(run, own, as_run, tmp_path):
    victim = read_rollouts(run, 1)[5]
    with pytest.raises(RewardError) as failure:
        train(as_run(tmp_path / "r", rewards=[{"function": f"{own}:picky"}]))
    message = str(failure.value)
    for part in ("'picky'", repr(victim["prompt_id"]), "sample 1", "cannot read this one", "reward.on_error"):
        assert part in message
    assert not read_metrics(tmp_path / "r")


def test_a_score_that_overflows_by_its_weight_is_named_and_goes_by_the_policy(micro_config, tmp_path):
    file = tmp_path / "overflows.py"
    file.write_text(
        "def grade(completions, log_extra, **_):\n"
        "    return [1e308 if len(c) % 2 else len(c) / 100 for c in completions]\n"
    )
    rewards = [{"function": f"{file}:grade", "weight": 10.0}]
    with pytest.raises(
        RewardError, match=r"reward 'grade' failed on prompt 'word_problems/.*too_large: returned 1e\+308"
    ):
        train(micro_config(tmp_path / "a", rewards=rewards, **{"sft.steps": 0}))
    train(micro_config(tmp_path / "b", steps=1, rewards=rewards, **QUICK | {"reward.on_error": "drop_sample"}))
    [line] = read_metrics(tmp_path / "b")
    assert line["reward/errors"] > 0
    assert "log/not_finite" not in line


@pytest.mark.parametrize(
    ("on_error", "abstained", "dropped"),
    [
        ("drop_sample", 1 / 16, 0),
        pytest.param("drop_group", 4 / 16, 1, marks=pytest.mark.slow),
        pytest.param("score=-1", 0, 0, marks=pytest.mark.slow),
    ],
)
def test_contract_6_a_failure_is_data_and_the_run_goes_on(
    run, own, as_run, letters, tmp_path, on_error, abstained, dropped
):
    rewards = [{"function": letters}, {"function": f"{own}:picky"}]
    train(as_run(tmp_path / "r", steps=1, rewards=rewards, **{"reward.on_error": on_error}))
    metrics = read_metrics(tmp_path / "r")[0]
    assert metrics["reward/errors"] == 1
    assert metrics["reward/abstained"] == abstained
    assert metrics["group/dropped"] == dropped
    assert metrics["learner/updates"] == 1
    [event] = _events(tmp_path / "r", "reward_error")
    victim = read_rollouts(run, 1)[5]
    assert (event["function"], event["prompt_id"], event["sample_index"]) == ("picky", victim["prompt_id"], 1)
    line = read_rollouts(tmp_path / "r", 1)[5]
    if on_error == "score=-1":
        assert line["reward"] == line["parts"]["letters"] - 1
    else:
        assert line["reward"] is None
        assert line["advantage"] == 0.0


# ---- steps that teach nothing, steps that cannot be taken -----------------------------------------------------------


def test_an_all_tied_run_changes_nothing_and_says_so(run, own, as_run, tmp_path):
    train(as_run(tmp_path / "r", steps=2, rewards=[{"function": f"{own}:equal"}]))
    for line in read_metrics(tmp_path / "r"):
        assert line["group/zero_variance"] == 1.0
        assert line["learner/updates"] == 0
    trained, warm = _weights(tmp_path / "r/policy"), _weights(run / "warm_start")
    assert all(torch.equal(tensor, warm[name]) for name, tensor in trained.items())
    assert {line["policy_version"] for line in read_rollouts(tmp_path / "r", 2)} == {0}
    assert _sampled(tmp_path / "r", [1]) != _sampled(tmp_path / "r", [2])  # another step, other prompts and noise


def test_contract_4_a_step_sees_new_noise_where_nothing_else_is_new(micro_config, tmp_path):
    """One prompt and a policy that does not move: only the step in the key tells two rollouts apart."""
    given = {"data.limit": 1, "prompts_per_step": 1, "steps": 2, "sft.steps": 0, "learner.learning_rate": 1e-30}
    train(micro_config(tmp_path / "run", **given))
    first, second = (read_rollouts(tmp_path / "run", step) for step in (1, 2))
    assert {line["prompt_id"] for line in first + second} == {first[0]["prompt_id"]}
    assert not {str(line["token_ids"]) for line in first} & {str(line["token_ids"]) for line in second}
    trunks = [checkpoint.load(tmp_path / f"run/checkpoints/step_{n:06d}").tensors["policy"] for n in (1, 2)]
    moved = [name for name in trunks[0] if not torch.equal(trunks[0][name], trunks[1][name])]
    assert not [name for name in moved if name.startswith("trunk.")]


def _fail_at(monkeypatch, steps: set[int]) -> None:
    """The loss of these steps is NaN."""
    whole = PolicyTerm.scalar

    def scalar(self, mini, forward, work):
        loss = whole(self, mini, forward, work)
        return loss * math.nan if work.batch.step in steps else loss

    monkeypatch.setattr(PolicyTerm, "scalar", scalar)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_aborts_with_the_batch_and_the_way_out(micro_config, tmp_path, monkeypatch):
    _fail_at(monkeypatch, {2})
    folder = tmp_path / "r"
    with pytest.raises(NonFiniteStep) as failure:
        train(micro_config(folder, **QUICK))
    message = str(failure.value)
    for part in (
        "step 2: the loss is nan",
        "step_000002.jsonl.zst",
        "learner.learning_rate",
        'resume="auto", force=True',
    ):
        assert part in message
    assert len(read_rollouts(folder, 2)) == 16
    assert [line["step"] for line in read_metrics(folder)] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    # The way out works.
    monkeypatch.undo()
    train(micro_config(folder, **QUICK | {"learner.learning_rate": 1e-3}), resume="auto", force=True)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]


@pytest.mark.slow
def test_kl_towards_the_reference_starts_at_zero(micro_config, tmp_path):
    for name, lora in (("full", {}), ("lora", {"lora.rank": 4})):
        train(micro_config(tmp_path / name, steps=2, **{"loss.beta": 0.1, "sft.steps": 1}, **lora))
        kls = [line["loss/kl"] for line in read_metrics(tmp_path / name)]
        assert kls[0] == 0.0
        assert kls[1] > 0


def test_free_options_are_options():
    """A key of the list of what a resumed run may change is a key of the configuration."""
    from grpo.config.run import TrainConfig
    from rewards.config.options import _options

    names = {option.key for option in _options(TrainConfig.model_construct())}
    assert all(name in names for name in resume.FREE_TO_CHANGE)


# ---- other policies, precisions and temperatures --------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(hf_policy, tmp_path_factory) -> str:
    """What `quartet convert` makes of a small Llama: SmolLM2's case in miniature."""
    source, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("mla") / "model"
    hf_policy("llama", 0, num_hidden_layers=2, tie_word_embeddings=True).save(source)
    convert_checkpoint(str(source), folder, prompts=["Tom has 5 pens.", "How many?"])
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {},
        pytest.param({"lora.rank": 4}, marks=pytest.mark.long),
        pytest.param({"head": True}, marks=pytest.mark.long),
        {"head": True, "lora.rank": 4},
    ],
)
def test_a_converted_dense_model_is_a_policy_too(converted, micro_config, tmp_path, given, monkeypatch):
    has_head = "head" in given
    given = {name: value for name, value in given.items() if name != "head"}
    if has_head:
        Policy.load(converted, add_mtp=True).save(tmp_path / "drafts")
        converted = str(tmp_path / "drafts")
    monkeypatch.setattr(draft_head, "PAYS", 0.0)  # a new head pays nothing yet, and is to learn in every step
    drafts = {"rollout.draft_tokens": None, "sft.steps": 0, "model": converted}
    train(micro_config(tmp_path / "r", steps=2, **drafts | given))
    for line in read_metrics(tmp_path / "r"):
        assert line["mismatch/logprob_abs_mean"] < 1e-4
        assert line["learner/updates"] == 1
        assert ("loss/mtp" in line) == has_head
    assert (tmp_path / "r/draft_costs.json").exists() == has_head  # measured where there is a head
    before, after = AutoModelForCausalLM.from_pretrained(converted), Policy.load(tmp_path / "r/policy")
    moved = {
        name
        for (name, p), (_, q) in zip(before.named_parameters(), after.trunk.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved
    assert not moved & set(frozen_parameter_names(after.config))
    assert (after.mtp is not None) == has_head


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.5, marks=pytest.mark.slow)])
def test_contract_2_sampler_and_learner_score_at_the_same_temperature(micro_config, tmp_path, temperature):
    train(micro_config(tmp_path / "r", steps=2, **QUICK | {"rollout.temperature": temperature}))
    assert all(line["mismatch/logprob_abs_mean"] < 1e-4 for line in read_metrics(tmp_path / "r"))


@pytest.mark.slow
def test_bfloat16_weights_are_trained_and_the_mismatch_is_seen(micro_config, tmp_path):
    train(micro_config(tmp_path / "r", steps=2, dtype="bfloat16", **QUICK))
    for line in read_metrics(tmp_path / "r"):
        assert 1e-6 < line["mismatch/logprob_abs_mean"] < 0.2
        assert line["learner/updates"] == 1
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "r/policy")
    precise = [name for name, p in trained.named_parameters() if p.dtype != torch.bfloat16]
    assert precise == ["model.layers.1.mlp.gate.weight"]  # transformers keeps routers in fp32


@pytest.mark.slow
def test_a_run_whose_last_evaluation_was_cut_off_is_evaluated_when_it_is_resumed(micro_config, tmp_path, monkeypatch):
    config = micro_config(tmp_path / "r", steps=2, **QUICK | {"eval.limit": 3})
    evaluate = HeldOut.evaluate

    def cut_off(self, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return evaluate(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "evaluate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    results = train(config, resume="auto")
    assert list(results.evaluations) == ["after GRPO, sampled", "after GRPO, greedy"]
    assert "eval/reward_mean" in read_metrics(tmp_path / "r")[2]
    assert not train(config, resume="auto").evaluations


@pytest.mark.slow
def test_a_run_that_was_cut_off_between_its_last_evaluation_and_its_policy_records_it_once(
    micro_config, tmp_path, monkeypatch
):
    config, save = micro_config(tmp_path / "r", steps=1, **QUICK | {"eval.limit": 3}), Policy.save

    def cut_off(self, folder):
        if folder.name == "policy":
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume="auto")
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/reward_mean" in line] == [0, 1]
    assert [line["step"] for line in lines if "reward/mean" in line] == [1]


def test_a_damaged_sft_stage_is_refused_by_a_resume_and_steps_of_one_that_is_done_go(micro_config, tmp_path):
    config = micro_config(tmp_path / "r", steps=2, **{"sft.steps": 1})
    with pytest.raises(Stopped):
        train(config, stop_after=1)
    file = tmp_path / "r/warm_start/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    with pytest.raises(PolicyError, match="warm_start' is damaged: model.safetensors is .*digests.json says"):
        train(config, resume="auto")
    file.write_bytes(content)
    left = tmp_path / "r/warm_start_checkpoints/step_000002"
    left.mkdir(parents=True)
    train(config, resume="auto")
    assert not left.parent.exists()


@pytest.mark.slow
def test_draft_costs_are_measured_once_a_run_and_reused_on_resume(micro_config, tmp_path, monkeypatch):
    config = micro_config(tmp_path / "r", steps=2, **QUICK | {"rollout.draft_tokens": None})
    with pytest.raises(Stopped):
        train(config, stop_after=1)
    costs = CostTable.load(tmp_path / "r/draft_costs.json")
    written = (tmp_path / "r/draft_costs.json").stat()

    def measured_again(*_):
        raise AssertionError("a resumed run has its table")

    monkeypatch.setattr(Engine, "measure_costs", measured_again)
    train(config, resume="auto")
    assert CostTable.load(tmp_path / "r/draft_costs.json") == costs
    assert (tmp_path / "r/draft_costs.json").stat() == written  # not written again


# ---- how a run ends -------------------------------------------------------------------------------------------------


def _run_metrics(folder: Path) -> dict[str, float]:
    return {name: value for name, value in read_metrics(folder)[-1].items() if name.startswith("run/")}


def test_a_run_that_ends_says_so_in_an_event_and_its_metrics(micro_config, tmp_path):
    folder, short = tmp_path / "r", QUICK | {"steps": 2}
    with pytest.raises(Stopped):
        train(micro_config(folder, **short), stop_after=1)
    [end] = _events(folder, "end")
    assert (end["how"], end["after_step"]) == ("stopped", 1)
    assert end["error"].startswith("Stopped: stopped after step 1")
    assert not _run_metrics(folder)
    train(micro_config(folder, **short), resume="auto")
    assert [(end["how"], end["after_step"]) for end in _events(folder, "end")] == [("stopped", 1), ("finished", 2)]
    assert "error" not in _events(folder, "end")[-1]
    assert _run_metrics(folder) == {"run/interruptions": 1}
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    assert not _events(folder, "undocumented_metric")


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_is_counted_when_it_goes_on(micro_config, tmp_path, saved):
    """Also where it had saved nothing, and begins anew."""
    folder, short = tmp_path / "r", QUICK | {"steps": 3}
    with pytest.raises(Stopped):
        train(micro_config(folder, **short), stop_after=1)
    if not saved:
        shutil.rmtree(folder / "checkpoints")
    events = folder / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(line for line in lines if json.loads(line)["event"] != "end"))
    with pytest.raises(Stopped):
        train(micro_config(folder, **short), resume="auto", stop_after=2)
    assert _run_metrics(folder) == {"run/killed": 1}
    train(micro_config(folder, **short), resume="auto")
    assert _run_metrics(folder) == {"run/killed": 1, "run/interruptions": 1}


@pytest.mark.slow
def test_a_reward_that_ends_a_run_is_an_event_with_function_prompt_and_sample(micro_config, tmp_path):
    path = tmp_path / "late.py"
    path.write_text(
        "def late(completions, trainer_state, **_):\n"
        "    if trainer_state.global_step >= 1:\n        raise RuntimeError('too late')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    options = QUICK | {"steps": 2, "rewards": [{"function": f"{path}:late"}]}
    with pytest.raises(RewardError, match="too late"):
        train(micro_config(tmp_path / "r", **options))
    [failure] = _events(tmp_path / "r", "reward_error")
    assert (failure["function"], failure["kind"], failure["step"]) == ("late", "raised", 2)
    assert failure["prompt_id"]
    assert "too late" in failure["message"]
    [end] = _events(tmp_path / "r", "end")
    assert (end["how"], end["after_step"]) == ("failed", 1)
    assert "too late" in end["error"]
    path.write_text("def late(completions, trainer_state, **_):\n    return [float(len(c)) for c in completions]\n")
    train(micro_config(tmp_path / "r", **options), resume="auto", force=True)
    assert _run_metrics(tmp_path / "r") == {"run/failures": 1}
    assert [end["how"] for end in _events(tmp_path / "r", "end")] == ["failed", "finished"]


def test_an_interruption_before_the_first_step_is_an_event_without_metrics(micro_config, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "steps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(micro_config(tmp_path / "r", **{"sft.steps": 0}))
    [end] = _events(tmp_path / "r", "end")
    assert (end["how"], end["after_step"]) == ("interrupted", None)
    assert not read_metrics(tmp_path / "r")

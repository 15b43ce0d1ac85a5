"""The public names of grpo: a run from Python, rewards that are functions of the process, estimators from a file."""

import importlib

import pytest
import torch

import grpo
import rewards
from grpo.algorithm import losses, own
from grpo.cli.commands import summary
from grpo.config.loss import LossOptions
from grpo.learner.prepare import estimate
from policies.files.atomic import write_file
from rewards.config.options import ConfigError, load
from rewards.group_score import GroupScore

OWN = """
import torch
from grpo import advantage, objective

@advantage
def centred(rewards_PG):
    return rewards_PG - rewards_PG.nanmean(1, keepdim=True)

@advantage
def wide(rewards_PG):
    return torch.zeros(1, 7)

@advantage
def late(rewards_PG, lengths_PG):
    return (2 * rewards_PG - 1)[..., None] * torch.arange(int(lengths_PG.max()))

@advantage
def marked(rewards_PG, *, parts):
    return parts["r"]

@advantage
def narrow(rewards_PG):
    return rewards_PG[..., None]

@advantage
def infinite(rewards_PG):
    return rewards_PG.log()

@advantage
def longer(rewards_PG):
    return rewards_PG[..., None].expand(-1, -1, 5)

@advantage
def tried(rewards_PG, lengths_PG):
    assert (rewards_PG.tolist(), lengths_PG.tolist()) == ([[0, 1, 0], [1, 0, 0]], [[1, 2, 3]] * 2)
    return rewards_PG

@objective(aggregate="dapo")
def plain(ratio, advantages, policy_logprobs, options):
    assert (policy_logprobs <= 0).all()
    return advantages * policy_logprobs

def unmarked(rewards_PG):
    return rewards_PG
"""


QUICK = {"sft.steps": 0}


@pytest.fixture
def file(tmp_path):
    write_file(tmp_path / "mine.py", OWN.encode())
    return tmp_path / "mine.py"


def short(completions, **_):
    return [-len(text) / 100 for text in completions]


def same(completions, **_):
    return [1.0] * len(completions)


def test_ten_lines_of_python_are_a_run(micro_config, tmp_path):
    given = QUICK | {"eval.limit": 4}
    result = grpo.train(micro_config(tmp_path / "run", steps=2, **given), reward=[short, same])
    assert result.folder == tmp_path / "run"
    steps = [line for line in result.metrics if "reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert (line["reward/part/same"], -1 < line["reward/part/short"] < 0) == (1, True)
        assert line["reward/mean"] == pytest.approx(1 + line["reward/part/short"])
    assert list(result.evaluations) == [
        f"{at} GRPO, {way}" for at in ("before", "after") for way in ("sampled", "greedy")
    ]
    saved = grpo.load_policy(micro_config(tmp_path / "x", model=str(tmp_path / "run")))
    assert all(torch.equal(p, dict(saved.named_parameters())[n]) for n, p in result.policy.named_parameters())


def test_a_function_that_raises_is_named_with_its_place(micro_config, tmp_path):
    def broken(completions, **_):
        raise RuntimeError("no reward today")

    with pytest.raises(rewards.RewardError, match=r"no reward today \(test_door.py:\d+ in broken\)"):
        grpo.train(micro_config(tmp_path / "run"), reward=broken)
    assert not (tmp_path / "run").exists()


def test_a_run_of_python_functions_says_how_it_is_gone_on_with(micro_config, tmp_path, monkeypatch):
    grpo.train(micro_config(tmp_path / "run", steps=1, **QUICK), reward=short)
    config = load(grpo.TrainConfig, tmp_path / "run/config.yaml", {"steps": 2})
    assert grpo.train(config, reward=short, resume="auto", force=True).metrics[-1]["step"] == 2
    monkeypatch.setattr("rewards.registry.CALLABLES", {})  # as in another process
    with pytest.raises(rewards.RewardError, match="'python:short' was a function of a script; run it there"):
        grpo.train(config, resume="auto")


def test_public_names_are_there_and_others_are_named():
    """The name of a module does not take the place of the function."""
    assert importlib.import_module("grpo.train") is not grpo.train
    assert importlib.import_module("grpo.sft") is not grpo.sft
    assert all(callable(getattr(grpo, name)) for name in ("train", "sft"))
    assert all(getattr(grpo, name) for name in grpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has .*train"):
        _ = grpo.trian


@pytest.mark.slow
def test_an_estimator_of_the_users_own_is_used(file, micro_config, tmp_path):
    """Centred by hand: 1 and 0 become ±½; None has no advantage, and a tied group has nothing to teach."""
    scores = [GroupScore([1.0, 0.0, None], {"r": []}), GroupScore([0.5, 0.5, 0.5], {"r": []})]
    advantages, tied = estimate(scores, LossOptions(advantage=f"{file}:centred"), {})
    assert advantages.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]
    assert tied.tolist() == [False, True]
    own.try_out(LossOptions(advantage=f"{file}:tried", loss_type=f"{file}:plain"), 3)
    for name, shown in (("wide", r"\[1, 7\], finite: True"), ("infinite", r"\[2, 3\], finite: False")):
        with pytest.raises(ValueError, match=rf"{name} gave {shown}; give a finite tensor \[2, 3\]"):
            estimate(scores, LossOptions(advantage=f"{file}:{name}"), {})
    found = []
    for name, given in (("a", {"loss.scale_rewards": "none"}), ("b", {"loss.advantage": f"{file}:centred"})):
        result = grpo.train(micro_config(tmp_path / name, steps=2, **QUICK | given), reward=short)
        found.append([line["loss/policy"] for line in result.metrics])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_an_estimator_may_give_an_advantage_to_every_token(file, micro_config, tmp_path):
    """By hand: of three and two tokens the later ones get more; the mark of a reward is read by its name."""
    scores = [GroupScore([1.0, 0.0], {"r": [2.0, 4.0]})]
    advantages, tied = estimate(scores, LossOptions(advantage=f"{file}:late"), {}, [[3, 2]])
    assert advantages == [[[0.0, 1.0, 2.0], [-0.0, -1.0]]]
    assert tied.tolist() == [False]
    advantages, _ = estimate(scores, LossOptions(advantage=f"{file}:marked"), {}, [[3, 2]])
    assert advantages.tolist() == [[2.0, 4.0]]
    advantages, _ = estimate(scores, LossOptions(advantage=f"{file}:longer"), {}, [[3, 2]])
    assert advantages == [[[1.0, 1.0, 1.0], [0.0, 0.0]]]
    with pytest.raises(ValueError, match=r"narrow gave \[1, 2, 1\], finite: True; give a finite tensor \[1, 2, 3\]"):
        estimate(scores, LossOptions(advantage=f"{file}:narrow"), {}, [[3, 2]])
    given = QUICK | {"loss.advantage": f"{file}:late"}
    result = grpo.train(micro_config(tmp_path / "a", steps=1, **given), reward=short)
    assert result.metrics[-1]["policy/approx_kl"] > 0


def test_an_objective_of_the_users_own_is_used_with_its_denominators(file):
    policy, old = torch.tensor([[0.6, 0.5], [0.2, 0.9]]).log(), torch.tensor([[0.4, 0.5], [0.4, 0.5]]).log()
    given = losses.Logprobs(policy, old), torch.tensor([1.0, -1.0]), torch.tensor([[True, True], [True, False]])
    loss, _ = losses.policy_loss(*given, LossOptions(loss_type=f"{file}:plain"))
    expected = -(policy[0].sum() - policy[1, 0]) / 3
    assert loss.item() == pytest.approx(expected.item())
    assert loss == losses.policy_loss(*given, LossOptions(loss_type="reinforce"))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "{}:unmarked"}, "unmarked is not marked: write @grpo.advantage above it"),
        ({"loss_type": "{}:centred"}, r"centred is not marked: write @grpo.objective\(aggregate=\"dapo\"\) above it"),
        ({"advantage": "{}:centered"}, r"'centered' is not there \(did you mean 'centred'"),
        ({"advantage": "nowhere.py:centred"}, "loss.advantage 'nowhere.py:centred': .*nowhere.py is not an existing"),
    ],
)
def test_what_is_not_there_or_not_marked_is_refused_before_a_model_is_loaded(file, options, message):
    with pytest.raises((ValueError, rewards.RewardError), match=message):
        own.try_out(LossOptions(**{name: value.format(file) for name, value in options.items()}), 2)
    config = {"output_dir": file.parent / "r"} | {f"loss.{name}": value.format(file) for name, value in options.items()}
    with pytest.raises((ValueError, rewards.RewardError), match=message):
        summary.dry_run(load(grpo.TrainConfig, None, config))


def test_a_misspelt_estimator_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="loss.advantage=rlooo .*'rank_softmax' or 'distill' or path/to/file.py"):
        load(grpo.TrainConfig, None, {"output_dir": str(tmp_path), "loss.advantage": "rlooo"})

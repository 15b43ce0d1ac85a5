"""`quartet why` against brute force: training again without a group, or with other options; a run's recorded steps,
taken again, have the bits that the run had."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard

from grpo.cli.parse import main
from grpo.cli.why import explain as explaining
from grpo.cli.why.explain import explain, read_alternative
from grpo.cli.why.report import opponents, report
from grpo.cli.why.rewind import Rewind, difference, read_config
from grpo.learner.learner import Learner
from grpo.learner.terms import draft_head
from grpo.run import checkpoint
from grpo.steps.ahead import Batches
from grpo.task.task import Task
from grpo.train import train
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts, rollout_path
from rollout.draft_stats import draft_gain

OPTIONS = {"eval.limit": 4, "learner.updates_per_batch": 2, "learner.learning_rate": 3e-3}
ONE = {"steps": 1, "sft.steps": 0}
TAKE = Batches.take_batch  # as it is without a test
# Letters as in `letters`; where the prompt is FLIPPED, the sign of the reward is wrong.
SABOTAGE = """
def letters(completions, prompts, **_):
    sign = [-1 if prompt == {flipped!r} else 1 for prompt in prompts]
    return [s * sum(c.isalpha() for c in text) / 20 for s, text in zip(sign, completions)]
"""


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("why") / "run"
    train(micro_config(folder, **OPTIONS))
    return folder


def retrained(run, copy, micro_config, monkeypatch, without: int | None = None, **other) -> float:
    """The held-out log-probability after the run's third step, trained again without a group or with other options."""
    shutil.copytree(run, copy)
    checkpoint.discard_after(copy / "checkpoints", 2)
    shutil.rmtree(copy / "policy")

    def less(self, step):
        drawn = TAKE(self, step)
        kept = [i for i in range(len(drawn.groups)) if i != without]
        pick = {name: [getattr(drawn, name)[i] for i in kept] for name in ("groups", "scores", "draws")}
        return replace(drawn, **pick)

    monkeypatch.setattr(Batches, "take_batch", less)
    config = micro_config(copy, **OPTIONS | other)
    train(config, resume="auto", force=bool(other))
    return measured(config, copy / "policy")


@torch.no_grad()
def measured(config, folder: Path) -> float:
    """Mean log π of the gold solutions' tokens, by a stock forward of each problem."""
    policy = Policy.load(folder)
    found = []
    with Task.of(config, scores=False) as task:
        for example in task.held_out:
            row = task.solution(example, policy.tokenizer, policy.stop_token_ids[0])
            prompt, ids = row.prompt_token_ids, row.samples[0].token_ids
            logits = policy.trunk(input_ids=torch.tensor([prompt + ids])).logits[0].double()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(found).mean().item()


@pytest.mark.long
def test_leaving_a_group_out_equals_training_without_it(run, micro_config, tmp_path, monkeypatch):
    found = explain(run, 3)
    after = measured(read_config(run), run / "policy")
    assert found.after == pytest.approx(after, rel=1e-6)
    for group in found.groups:
        without = retrained(run, tmp_path / str(group.number), micro_config, monkeypatch, without=group.number)
        assert abs(after - without) > 1e-4  # else nothing is compared
        assert group.effect == pytest.approx(after - without, rel=1e-3)


@pytest.mark.slow
def test_the_step_itself_comes_out_to_the_same_bits(run):
    for step in (1, 2, 3):
        found = explain(run, step, held_out=2, groups=1)
        assert (found.begins, found.difference, found.updates) == (step - 1, 0.0, 2)
        assert found.compared >= 6
        assert [group.effect is not None for group in found.groups].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flipped", [0, pytest.param(3, marks=pytest.mark.long)])
def test_a_flipped_reward_is_the_first_thing_named(micro_config, tmp_path, flipped):
    """Four groups of nearly one prompt and many completions: without a mistake they agree."""
    rows = [json.dumps({"question": f"Tom has {i} apples.", "answer": "1"}) for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    options = {
        "data.name": str(tmp_path / "data.jsonl"),
        "data.limit": None,
        "data.held_out": 0.5,
        "eval.limit": 2,
        "steps": 1,
        "rollout.group_size": 128,
        "rollout.max_completion_tokens": 2,
    }
    train(micro_config(tmp_path / "healthy", **options))
    healthy = explain(tmp_path / "healthy", 1, groups=1)
    prompt = read_rollouts(tmp_path / "healthy", 1)[128 * flipped]["prompt"]
    (tmp_path / "mine.py").write_text(SABOTAGE.format(flipped=prompt))
    train(micro_config(tmp_path / "run", **options, rewards=[{"function": f"{tmp_path}/mine.py:letters"}]))
    sabotaged = explain(tmp_path / "run", 1, groups=1)
    assert [group.cosine_with_rest > 0 for group in healthy.groups] == [True] * 4
    assert opponents(sabotaged)[0].number == flipped
    assert report(sabotaged).findings[0].evidence.startswith(f"Group {flipped} works against")
    assert flipped not in [group.number for group in opponents(healthy)]


@pytest.mark.slow
def test_what_if_equals_training_with_it(run, micro_config, tmp_path, monkeypatch):
    mine = tmp_path / "short.py"
    mine.write_text("def short(completions, **_):\n    return [-float(len(text)) for text in completions]\n")
    cases = [
        ({"loss.advantage": "rloo"}, ["loss.advantage=rloo"]),
        ({"loss.beta": 0.5, "loss.epsilon": 0.05}, ["loss.beta=0.5", "loss.epsilon=0.05"]),
        ({"learner.updates_per_batch": 1}, ["learner.updates_per_batch=1"]),
        ({"rewards": [{"function": f"{mine}:short"}]}, [f"rewards=[{{function: '{mine}:short'}}]"]),
    ]
    found = explain(run, 3, groups=1, what_if=[words for _, words in cases])
    assert [other.what for other in found.what_if] == [" ".join(words) for _, words in cases]
    for number, (options, _) in enumerate(cases):
        if "loss.beta" in options:
            continue  # a run cannot go on with a reference that its checkpoints lack
        expected = retrained(run, tmp_path / str(number), micro_config, monkeypatch, **options)
        assert found.before + found.what_if[number].change == pytest.approx(expected, rel=1e-6)
    assert found.what_if[0].cosine == pytest.approx(1.0, abs=0.2)
    assert found.what_if[3].cosine < 0.2
    assert len({round(other.change, 9) for other in found.what_if}) == 4


def test_one_group_token_by_token(run, capsys):
    found = explain(run, 3, group=2, tokens=20)
    capsys.readouterr()
    assert [group.effect is not None for group in found.groups] == [False, False, True, False]
    assert 0 < len(found.tokens) <= 20
    lines = read_rollouts(run, 3)[8:12]
    assert all(0 <= token.position < len(lines[token.sample]["token_ids"]) for token in found.tokens)
    signs = {token.sample: token.weight > 0 for token in found.tokens}
    assert all((lines[sample]["advantage"] > 0) == raised for sample, raised in signs.items())


def test_a_run_without_held_out_problems_is_measured_by_problems_that_the_step_did_not_draw(micro_config, tmp_path):
    train(micro_config(tmp_path / "run", **ONE))
    found = explain(tmp_path / "run", 1)
    assert found.held_out == "the gold solutions of 20 other training problems"  # 24 in all, 4 of them drawn
    assert found.before != found.after


def test_a_step_of_tied_groups_changed_nothing(micro_config, tmp_path):
    (tmp_path / "mine.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    rewards = [{"function": f"{tmp_path}/mine.py:same"}]
    train(micro_config(tmp_path / "run", **ONE, rewards=rewards))
    found = explain(tmp_path / "run", 1)
    [said] = report(found).findings
    assert said.evidence == (
        "Step 1 changed nothing: in each of its 4 groups all rewards are equal, so there was nothing to prefer."
    )
    assert found.change == 0.0
    assert all(group.effect == 0.0 for group in found.groups)


def test_the_command_answers_in_words_first(run, tmp_path, capsys):
    assert main(["why", str(run), "3", "--held_out", "2", "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("cost: 0 recorded steps from checkpoint 2")
    assert "because of group " in said.splitlines()[1] + said.splitlines()[2]
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["groups"]) == 4
    assert found["step"] == 3


def test_what_cannot_be_explained_is_refused_by_name(run, tmp_path, capsys, monkeypatch):
    for words, message in {
        ("3", "--group", "4"): "--group 4: step 3 has groups 0 to 3",
        ("9",): "no rollouts of step 9",
        ("3", "--what_if", "steps=5"): "--what_if steps=5: the rollouts are those of the record",
        ("3", "--what_if", "reward.on_error=score=0"): "--what_if reward.on_error=score=0: the rollouts are those of",
        ("3", "--what_if", "loss.advantage"): "--what_if loss.advantage: write KEY=VALUE, such as",
        ("3", "--what_if", "loss.advantage=gae"): "the run has no value head",
        ("3", "--what_if", "loss.epsilom=0.1"): "did you mean loss.epsilon",
    }.items():
        assert main(["why", str(run), *words]) != 0
        assert message in capsys.readouterr().err
    words = ["rewards=[{function: gsm8k}]", "reward.timeout_s=60"]  # limits of rewards are free where rewards are
    assert read_alternative(run, words).reward.timeout_s == 60
    assert main(["why", str(tmp_path), "1"]) == 1
    assert "is no run folder" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    lines = read_rollouts(copy, 3)
    for change, message in (
        ({"prompt": "2 + 2 = ?\n"}, "has another text now"),
        ({"prompt_id": "word_problems/99"}, "is not there now"),
        ({"logprobs": None}, "is no record of a step, or it is damaged"),
        ({"logprobs": [-1.0]}, "has not one log-probability for each token"),
        ({"policy_version": None}, "is no record of a step, or it is damaged"),
    ):
        text = "".join(json.dumps(line | change) + "\n" for line in lines[:4])
        rollout_path(copy, 3).write_bytes(zstandard.compress(text.encode()))
        assert main(["why", str(copy), "3"]) == 1
        assert message in capsys.readouterr().err
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("routing_replay: false", "routing_replay: true"))
    assert main(["why", str(copy), "3"]) == 1
    assert "learner.routing_replay" in capsys.readouterr().err
    monkeypatch.setattr(explaining, "AFFORDABLE", 1e-9)
    assert [group.effect for group in explain(run, 3).groups].count(None) == 3


KINDS = {
    "full": {},
    "preset": {"sft.steps": 0, "rollout.draft_tokens": None},
    "lora": {"lora.rank": 4, "loss.beta": 0.1},
    "ppo": {"loss.advantage": "gae", "loss.beta": 0.1, "learner.updates_per_batch": 2},
    "bfloat16": {"dtype": "bfloat16"},
    "ahead": {"rollout.staleness": 1, "balance.bias_rate": 0.01},
}


def replayed(folder: Path, step: int, begins: int) -> Learner:
    """The learner after `step`, by the records from the step `begins` on."""
    config = read_config(folder)
    with Task.of(config, scores=False) as task:
        rewind = Rewind(config, step, task)
        assert rewind.begins == begins
        for each in range(rewind.begins + 1, step + 1):
            rewind.replay(each)
        return rewind.learner


def recorded_gains(folder: Path) -> list[float | None]:
    """What drafts gained in the groups of each step, which says whether the head learns from them."""
    config = read_config(folder)
    with Task.of(config, scores=False) as task:
        rewind = Rewind(config, 1, task)
        groups = [rewind.recorded(step)[0] for step in range(1, config.steps + 1)]
    return [draft_gain([c for group in of_step for c in group.completions]) for of_step in groups]


def flat(learner: Learner) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": t for kind, part in learner.state()[0].items() for name, t in part.items()}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("full", "ppo"))) for kind in KINDS]
)
def test_a_replayed_step_leaves_the_bits_of_its_checkpoint(micro_config, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(draft_head, "PAYS", math.inf)  # the head rests wherever a gain is known, also in the record
    monkeypatch.setattr(draft_head, "IDLE_EVERY", 2)
    train(micro_config(tmp_path / "run", **{"sft.steps": 1} | KINDS[kind]))
    root = tmp_path / "run/checkpoints"
    saved = checkpoint.load(checkpoint.saved(root)[3])
    expected = {f"{k}/{n}": t for k, part in saved.tensors.items() for n, t in part.items() if k != "ahead"}
    shutil.rmtree(checkpoint.saved(root)[2])
    for begins in (1, 0):  # one step before the last is replayed, then both, from the SFT stage
        found = flat(replayed(tmp_path / "run", 3, begins))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        shutil.rmtree(checkpoint.saved(root)[1], ignore_errors=True) if begins else None
    assert recorded_gains(tmp_path / "run") == [line.get("draft/gain") for line in read_metrics(tmp_path / "run")]


def test_a_difference_is_relative_and_of_the_learner_alone():
    recorded = {"loss/policy": 0.5, "learner/grad_norm": 2.0, "loss/kl": None, "reward/mean": 1.0}
    again = {"loss/policy": 0.5, "learner/grad_norm": 1.0, "loss/kl": 1.0, "reward/mean": 9.0, "policy/entropy": 1.0}
    assert difference(recorded, again) == (2, "learner/grad_norm", 0.5)
    assert difference({}, again) == (0, "", 0.0)

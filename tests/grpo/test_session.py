"""The primitives: loops of one's own, what they give, and what they refuse."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zstandard
from safetensors.torch import load_file
from start_ranks import run_ranks

from grpo import Session
from grpo.config.loss import LossOptions
from grpo.config.mtp import HeadOptions
from grpo.config.run import SftConfig
from grpo.evaluation.held_out import HeldOut
from grpo.learner.head_learner import HeadLearner
from grpo.run.records import read_events, read_metrics
from grpo.run.stop import Stopped
from grpo.sft import sft
from grpo.train import train
from rewards.config.options import dump_yaml
from rewards.group_score import GroupScore
from rollout.faults import RolloutError

LOOPS = Path(__file__).parents[2] / "examples/09_own_loop"


def run_loop(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_path(str(LOOPS / name))


def sampled(folder):
    """The sampled ids of each step."""
    ids = {}
    for file in sorted((folder / "rollouts").iterdir()):
        lines = zstandard.ZstdDecompressor().decompress(file.read_bytes()).splitlines()
        ids[file.name] = [json.loads(line)["token_ids"] for line in lines]
    return ids


def assert_same_run(one, other, steps):
    first, second = (load_file(folder / "policy/model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert sampled(one) == sampled(other)
    assert len(sampled(one)) == steps
    assert len(read_metrics(one)) >= steps


def written(config, path):
    path.write_text(dump_yaml(config))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"learner.updates_per_batch": 2, "loss.beta": 0.1}, marks=pytest.mark.slow),
        pytest.param({"rollout.ahead": 1}, marks=pytest.mark.slow),
    ],
    ids=["plain", "two updates", "ahead"],
)
def test_contract_17_a_loop_over_the_primitives_gives_the_bits_of_quartet_train(
    micro_config, tmp_path, monkeypatch, options
):
    steps = 4  # one more than an epoch has
    config = micro_config(tmp_path / "ours", steps=steps, **options | {"data.limit": 12})
    train(config)
    run_loop(monkeypatch, "train.py", written(config, tmp_path / "run.yaml"), f"output_dir={tmp_path / 'theirs'}")
    assert_same_run(tmp_path / "ours", tmp_path / "theirs", steps)
    parts = [
        load_file(tmp_path / run / f"checkpoints/step_{steps:06d}/optimizer.safetensors") for run in ("ours", "theirs")
    ]
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())


@pytest.mark.slow
def test_contract_17_a_loop_that_supervises_gives_the_bits_of_quartet_sft(micro_config, tmp_path):
    given = micro_config(tmp_path).model_dump(include={"model", "threads", "rewards", "data"})
    given |= {"steps": 7, "prompts_per_step": 4, "eval": {"limit": 2}, "rollout": {"max_completion_tokens": 5}}
    sft(SftConfig(output_dir=tmp_path / "ours", **given))
    with Session.open(SftConfig(output_dir=tmp_path / "theirs", **given)) as session:
        for step in session.run.steps():
            batch = session.prepare(session.solutions(4))
            session.record(step, session.forward_backward(batch) | session.optim_step())
            session.save_if_due(step)
        result = session.finish()
    assert list(result.evaluations) == ["before, sampled", "before, greedy", "after, sampled", "after, greedy"]
    for file in ("policy/model", "checkpoints/step_000007/optimizer"):
        first, second = (load_file(tmp_path / run / f"{file}.safetensors") for run in ("ours", "theirs"))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_contract_17_on_two_ranks_too(micro_config, random_policy, tmp_path):
    random_policy(0).save(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "device": "cpu", "warm_start.steps": 0, "steps": 4}
    config = micro_config(tmp_path / "ours", rewards=[{"function": "gsm8k_format"}], **given)
    file = written(config, tmp_path / "run.yaml")
    run_ranks(["-m", "grpo", "train", str(file)], 2)
    run_ranks([str(LOOPS / "train.py"), str(file), f"output_dir={tmp_path / 'theirs'}"], 2)
    assert_same_run(tmp_path / "ours", tmp_path / "theirs", 4)


@pytest.mark.slow
def test_drawing_is_prompts_sampling_and_scoring(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "one")) as one, Session.open(micro_config(tmp_path / "two")) as two:
        for step, _ in zip(one.run.steps(), two.run.steps(), strict=True):
            drawn = one.draw(step)
            groups = two.sample(two.prompts(step), step=step)
            scores = two.score(groups)
            assert [c.token_ids for g in drawn.groups for c in g.completions] == [
                c.token_ids for g in groups for c in g.completions
            ]
            assert [score.rewards for score in drawn.scores] == [score.rewards for score in scores]
            for session, batch in ((one, one.prepare(drawn)), (two, two.prepare(groups, scores))):
                session.record(step, session.forward_backward(batch) | session.optim_step())
                session.publish()
    assert all(
        torch.equal(tensor, dict(two.policy.named_parameters())[name]) for name, tensor in one.policy.named_parameters()
    )


def test_a_first_batch_that_sampler_and_learner_read_differently_stops_the_run(micro_config, tmp_path, monkeypatch):
    """The canaries are too short to show it."""
    far = {"mismatch/logprob_abs_max": 0.2, "mismatch/logprob_abs_mean": 0.01}
    with Session.open(micro_config(tmp_path)) as session:
        monkeypatch.setattr(session.learner, "forward_backward", lambda *rest: far)
        for step in session.run.steps():
            batch = session.prepare(session.draw(step))
            with pytest.raises(RolloutError, match=r"up to 0.2 nats .*, before any update: .*`quartet check micro`"):
                session.forward_backward(batch)
            far["mismatch/logprob_abs_mean"] = 1e-4  # one token, whose experts are others
            session.forward_backward(batch)
            break


def test_contract_13_what_was_refused_is_checked_again_before_anything_is_sampled(micro_config, tmp_path, monkeypatch):
    with Session.open(micro_config(tmp_path, steps=1)) as session:
        prompts, publisher = session.prompts(1), session.publisher
        expected = session.sample(prompts, step=1)
        with monkeypatch.context() as patch:
            patch.setattr(publisher, "scores", lambda *_: 1 / 0)
            for act in (
                lambda: publisher.publish(),
                lambda: session.draw(1),
                lambda: session.sample(prompts, step=1),
                lambda: session.evaluate(),
            ):
                with pytest.raises(ZeroDivisionError):
                    act()
        assert session.sample(prompts, step=1) == expected
        assert publisher.version == 0


def test_an_advantage_of_each_token_is_the_gradients_weight(micro_config, tmp_path):
    """Advantages of one completion's tokens alone, by a hand-written loss of the same tokens."""
    with Session.open(micro_config(tmp_path / "r", **{"mtp.loss_weight": 0})) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
            advantages = [[[float(t + 1) * (i == 0) for t in range(n)] for i, n in enumerate(row)] for row in lengths]
            session.forward_backward(session.prepare(groups, advantages=advantages))
            gradient = {n: p.grad.clone() for n, p in session.policy.trunk.named_parameters() if p.grad is not None}
            session.learner.update.zero()
            session.learner._open.clear()
            zeros = [[0.0] * len(row) for row in lengths]

            def by_hand(logprobs, groups=groups):
                size, total = len(groups[0].completions), sum(map(len, logprobs))
                weights = [torch.arange(1.0, len(row) + 1) * (i % size == 0) for i, row in enumerate(logprobs)]
                ratios = [(row - row.detach()).exp() for row in logprobs]
                return -sum((w * r).sum() for w, r in zip(weights, ratios, strict=True)) / total

            session.forward_backward(session.prepare(groups, advantages=zeros), by_hand)
            for name, parameter in session.policy.trunk.named_parameters():
                if name in gradient:
                    torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-6, rtol=1e-4)
            assert sum(part.norm() for part in gradient.values()) > 1e-3
            session.optim_step()
            session.publish()
            session.record(step, {})


def test_where_nothing_counted_nothing_moves(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", **{"mtp.loss_weight": 0})) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            before = {name: p.detach().clone() for name, p in session.policy.named_parameters()}
            metrics = session.forward_backward(session.prepare(groups)) | session.optim_step()  # all scores are 0
            assert metrics["learner/updates"] == 0
            assert not session.learner.optimizer.state
            assert all(torch.equal(before[name], p) for name, p in session.policy.named_parameters())
            session.record(step, metrics)


def test_a_rate_of_ones_own_moves_by_that_rate(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        for step in session.run.steps():
            batch = session.prepare(session.draw(step))
            session.forward_backward(batch, lambda logprobs, sampled, advantages, mask: -logprobs)
            metrics = session.optim_step(3e-4, betas=(0.5, 0.5))
            assert metrics["learner/learning_rate"] == pytest.approx(3e-4)
            assert {group["betas"] for group in session.learner.optimizer.param_groups} == {(0.5, 0.5)}
            session.record(step, metrics)


def test_supervised_steps_raise_the_gold_solutions(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=6, **{"learner.learning_rate": 1e-2})) as session:
        losses = []
        rows = session.solutions(4)
        for step in session.run.steps():
            losses.append(session.forward_backward(session.prepare(rows), "supervised")["loss/sft"])
            session.record(step, session.optim_step())
    assert losses[-1] < losses[0] - 0.1


def test_a_loss_of_all_solutions_gets_each_of_them(micro_config, tmp_path):
    """Its gradient is that of supervised steps where the loss is the same."""
    seen, gradients = [], []

    def mean(logprobs):
        seen.append([len(one) for one in logprobs])
        return -torch.cat(list(logprobs)).mean()

    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        next(session.run.steps())
        rows = session.solutions(3)
        rows[1] = replace(rows[1], samples=[replace(one, token_ids=one.token_ids[:-3]) for one in rows[1].samples])
        for loss in ("supervised", mean):
            session.forward_backward(session.prepare(rows), loss)
            gradients.append(session.optim_step(1e-12)["learner/grad_norm"])
    assert seen[0] == [row.num_completion_tokens for row in rows]
    assert len(set(seen[0])) > 1
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-4)


def test_log_probabilities_are_those_that_were_sampled(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r")) as session:
        prompts = session.prompts(1)
        groups = session.sample(prompts, step=1)
        scored = session.logprobs(prompts, [[c.token_ids for c in group.completions] for group in groups])
        for group, rows in zip(groups, scored, strict=True):
            for completion, row in zip(group.completions, rows, strict=True):
                assert row == pytest.approx(completion.logprobs, abs=1e-4)


def test_texts_of_ones_own_are_as_if_they_had_been_sampled_now(micro_config, tmp_path):
    """An importance weight of log-probabilities that stand as 0 would be the policy's own probability."""
    with Session.open(micro_config(tmp_path / "r", **{"learner.learning_rate": 1e-3})) as session:
        for step in session.run.steps():
            group = session.group("3 + 4 = ?", ["#### 7", "#### 8"])
            [expected] = session.logprobs([group.prompt], [[c.token_ids for c in group.completions]])
            assert [c.logprobs for c in group.completions] == expected
            assert all(max(c.logprobs) < 0 for c in group.completions)
            batch = session.prepare([group], [GroupScore([1.0, 0.0], {})])
            metrics = session.learn(batch)
            assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.0, abs=1e-4)
            session.record(step, metrics)


def test_other_rewards_score_the_same_groups(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r")) as session:
        groups = session.sample(session.prompts(1), step=1, group_size=3)
        scores = session.score(groups, lambda completions, **columns: [float(len(text)) for text in completions])
        assert [score.rewards for score in scores] == [[float(len(t)) for t in group.texts] for group in groups]
        assert {len(group.completions) for group in groups} == {3}


def test_a_failure_of_another_reward_is_data_too(micro_config, tmp_path):
    """Contract 6: as the run's option says, and an event."""

    def mine(completions, **columns):
        return [ValueError("x") if i == 0 else 1.0 for i in range(len(completions))]

    with Session.open(micro_config(tmp_path / "r", **{"reward.on_error": "drop_sample"})) as session:
        [score] = session.score(session.sample(session.prompts(1), step=1, group_size=2)[:1], mine)
        assert score.rewards == [None, 1.0]
    assert [event["message"] for event in read_events(tmp_path / "r") if event["event"] == "reward_error"]


def test_contract_9_numbers_of_ones_own_are_those_of_the_checkpoint(micro_config, tmp_path):
    """They hold from their step on, also after a resume; an earlier checkpoint has those from before."""

    def numbers(session):
        return [(g["betas"], g["eps"], g["weight_decay"]) for g in session.learner.optimizer.param_groups]

    config, seen = micro_config(tmp_path / "r", steps=3, **{"checkpoint.every": 1}), []

    def loop():
        with Session.open(config, stop_after=2) as session:
            for step in session.run.steps():
                seen.append((session.save(tmp_path / f"kept_{step}"), numbers(session)))
                session.forward_backward(session.prepare(session.draw(step)))
                session.optim_step(**{"betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.1} if step == 2 else {})
                seen[-1] += (numbers(session),)
                session.publish()
                session.record(step, {})
                session.save_if_due(step)

    with pytest.raises(Stopped):
        loop()
    path, configured, changed = seen[1]
    assert changed != configured
    with Session.open(config, resume="auto") as session:
        assert numbers(session) == changed
        session.load(path)
        assert numbers(session) == configured


def test_a_checkpoint_of_a_session_brings_it_back(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=4)) as session:
        for step in session.run.steps():
            if step == 3:
                path = session.save(tmp_path / "kept")
                before = {name: p.detach().clone() for name, p in session.policy.named_parameters()}
            drawn = session.draw(step)
            session.record(step, session.learn(session.prepare(drawn)))
            session.publish()
        version = session.publisher.version
        session.load(path)
        assert all(torch.equal(before[name], p) for name, p in session.policy.named_parameters())
        assert session.publisher.version == session.learner.policy_version == version - 2
        again = session.sample(session.prompts(3), step=3)
    assert [c.token_ids for g in again for c in g.completions] == sampled(tmp_path / "r")["step_000003.jsonl.zst"]


def test_a_checkpoint_from_before_the_first_update_leaves_no_moments(micro_config, tmp_path):
    ends = []
    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        next(session.run.steps())
        drawn, start = session.draw(1), session.save(tmp_path / "kept")
        for _ in range(2):
            session.load(start)
            assert not session.learner.optimizer.state
            session.learn(session.prepare(drawn))
            ends.append([parameter.detach().clone() for parameter in session.policy.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_options_of_another_loss_are_heeded_or_refused(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        next(session.run.steps())
        drawn = session.draw(1)
        batch = session.prepare(drawn.groups, [GroupScore([1.0] * len(g.completions), {}) for g in drawn.groups])
        with pytest.raises(ValueError, match="beta=0.1: there is no reference; set loss.beta in the configuration"):
            session.forward_backward(batch, LossOptions(beta=0.1))
        with pytest.raises(ValueError, match="mask_truncated_completions=True: batches are prepared by .*=False"):
            session.forward_backward(batch, LossOptions(mask_truncated_completions=True))
        session.forward_backward(batch, LossOptions(entropy_coef=1.0))  # all groups are tied: nothing else teaches
        assert session.optim_step()["learner/grad_norm"] > 0


def test_the_last_evaluation_is_of_what_a_loop_has_learned_and_it_is_not_told_that_this_is_nothing(
    micro_config, tmp_path, monkeypatch
):
    """A loop may publish never, and learn from rewards that are all the same."""
    versions, evaluate = [], HeldOut.evaluate
    with Session.open(micro_config(tmp_path / "r", steps=6, **{"eval.limit": 2, "lora.rank": 2})) as session:

        def noted(held_out, *rest):
            versions.append(session.publisher.version)
            return evaluate(held_out, *rest)

        monkeypatch.setattr(HeldOut, "evaluate", noted)
        groups = session.sample(session.prompts(1), step=1)
        for step in session.run.steps():
            scores = [GroupScore([1.0] * len(group.completions), {}) for group in groups]
            session.forward_backward(session.prepare(groups, scores), minus)
            session.record(step, session.optim_step())
        session.finish()
        assert versions[-1] == session.learner.policy_version == 6
    assert not [event for event in read_events(tmp_path / "r") if event["event"] == "nothing_learned"]


@pytest.mark.slow
def test_a_loop_that_samples_itself_has_nothing_sampled_ahead(micro_config, tmp_path):
    seen = []
    for ahead in (0, 1):
        config = micro_config(tmp_path / str(ahead), steps=2, **{"rollout.ahead": ahead})
        with Session.open(config) as session:
            for step in session.run.steps():
                groups = session.sample(session.prompts(step), step=step)
                seen.append([group.prompt.prompt_id for group in groups])
                session.forward_backward(session.prepare(groups, session.score(groups)))
                session.record(step, session.optim_step())
                session.publish()
                assert session.publisher.version == step
            assert session.batches.ready == {}
    assert seen[:2] == seen[2:]


@pytest.mark.slow
def test_a_stopped_loop_of_ones_own_is_saved_and_goes_on(micro_config, tmp_path, monkeypatch):
    config = micro_config(tmp_path / "whole", steps=4)
    train(config)
    config = micro_config(tmp_path / "parts", steps=4)

    def loop(**flags):
        with Session.open(config, **flags) as session:
            for step in session.run.steps():
                session.record(step, session.learn(session.prepare(session.draw(step))))
                session.publish()
                session.save_if_due(step)
            session.finish()

    with pytest.raises(Stopped):
        loop(stop_after=2)
    loop(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)


def test_a_step_that_fails_takes_no_prompts_with_it_either(micro_config, tmp_path):
    """A loop over `prompts` that fails in step 2 before its update asks for the same prompts when it goes on."""
    config, asked = micro_config(tmp_path / "r", steps=3, **{"checkpoint.every": 10}), {}

    def loop(fails, **flags):
        with Session.open(config, **flags) as session:
            for step in session.run.steps():
                prompts = session.prompts(step)
                asked.setdefault(step, []).append([prompt.prompt_id for prompt in prompts])
                if step == fails:
                    raise OSError("the reward's server is gone")
                groups = session.sample(prompts, step=step)
                session.record(step, session.learn(session.prepare(groups, session.score(groups))))
                session.publish()
                session.save_if_due(step)
            session.finish()

    with pytest.raises(OSError, match="server is gone"):
        loop(2)
    loop(None, resume="auto")
    assert asked[2][0] == asked[2][1]
    assert asked[2][0] != asked[3][0]


@pytest.mark.slow
def test_sessions_share_one_frozen_base(micro_config, tmp_path):
    lora = {"lora": {"rank": 2}, "learner.learning_rate": 1e-2}
    first, second = (micro_config(tmp_path / name, seed=seed, **lora) for seed, name in enumerate(("one", "two")))
    with Session.open(first) as one, Session.open(second, base=one) as two:
        weights, others = dict(one.policy.trunk.named_parameters()), dict(two.policy.trunk.named_parameters())
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        assert frozen
        assert all(weights[name] is others[name] for name in frozen)
        before = {name: weight.detach().clone() for name, weight in others.items()}
        for step in one.run.steps():
            one.record(step, one.learn(one.prepare(one.draw(step))))
            one.publish()
        assert all(torch.equal(before[name], weight) for name, weight in others.items())
        moved = [name for name in weights if name not in frozen]
        assert any(not torch.equal(weights[name], others[name]) for name in moved)


def test_a_base_that_moves_cannot_be_shared(micro_config, tmp_path):
    with (
        Session.open(micro_config(tmp_path / "one")) as one,
        pytest.raises(ValueError, match="set lora in both"),
        Session.open(micro_config(tmp_path / "two"), base=one),
    ):
        pass


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda a, b, c: a, "a loss of 3 parameters"),
        (lambda policy, reference: policy[0].sum(), "there is no reference"),
        ("dapoo", "loss_type"),
    ],
)
def test_losses_that_cannot_be_are_refused_by_name(micro_config, tmp_path, loss, message):
    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        for step in session.run.steps():
            batch = session.prepare(session.draw(step))
            with pytest.raises(ValueError, match=message):
                session.forward_backward(batch, loss)
            session.record(step, session.learn(batch))


def test_several_updates_of_a_batch_are_a_step_of_the_learner(micro_config, tmp_path):
    """What is done once a step is done once: the routers' biases move by their rate."""
    policies = []
    for name in ("session", "learner"):
        config = micro_config(tmp_path / name, steps=1, **{"learner.updates_per_batch": 2, "balance.bias_rate": 0.1})
        with Session.open(config) as session:
            for step in session.run.steps():
                batch = session.prepare(session.draw(step))
                metrics = session.learn(batch) if name == "session" else session.learner.step(batch)
                session.run.reached()
                session.record(step, metrics)
            policies.append(session.learner.state()[0]["policy"])
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())


def minus(logprobs, sampling_logprobs, advantages, mask):
    return -logprobs


def squares(logprobs, sampling_logprobs, advantages, mask):
    return logprobs.square()


def test_two_losses_on_one_batch_add_up(micro_config, tmp_path):
    """The second call goes on with nothing of the first: its own loss is what it adds."""
    with Session.open(micro_config(tmp_path / "r", steps=1, **{"mtp.loss_weight": 0})) as session:
        for step in session.run.steps():
            batch, gradients = session.prepare(session.draw(step)), []
            losses = [minus, squares]
            for chosen in (losses[:1], losses[1:], losses):
                for loss in chosen:
                    session.forward_backward(batch, loss)
                gradients.append(
                    {n: p.grad.clone() for n, p in session.policy.named_parameters() if p.grad is not None}
                )
                session.learner.update.zero()
                session.learner._open.clear()
            one, other, both = gradients
            for name, gradient in both.items():
                torch.testing.assert_close(gradient, one[name] + other[name], atol=1e-6, rtol=1e-4)
            session.record(step, session.learn(batch))


def test_contract_16_what_is_held_out_is_not_learned_and_what_was_learned_is_not_evaluated(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1, **{"eval.limit": 4})) as session:
        for step in session.run.steps():
            held_out = session.held_out.prompts[:1]
            groups = session.sample(held_out, step=step)
            with pytest.raises(ValueError, match="is held out, and nothing may be learned from it"):
                session.prepare(groups, session.score(groups))
            with pytest.raises(ValueError, match="were trained on"):
                session.evaluate(session.task.train[:2])
            assert session.evaluate(session.task.held_out[:2])["sampled"].prompts == 2
            session.record(step, session.learn(session.prepare(session.draw(step))))


def test_recorded_lessons_teach_the_draft_head_and_nothing_else(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1, **{"eval.limit": 4})) as session:
        for step in session.run.steps():
            reader = HeadLearner(session.plain or session.policy, HeadOptions(), temperature=1.0, seed=0)
            session.policy.trunk.requires_grad_(True)
            lessons = reader.read(session.solutions(4))
            before = {name: tensor.clone() for name, tensor in session.policy.named_parameters()}
            batch = session.prepare(lessons)
            metrics = session.forward_backward(batch) | session.optim_step()
            assert metrics["loss/mtp"] > 0
            now = dict(session.policy.named_parameters())
            moved = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
            assert moved
            assert all(name.startswith("mtp.") for name in moved)
            token, [example, *_] = session.policy.stop_token_ids[0], session.task.held_out
            rows = [session.task.solution(example, session.policy.tokenizer, token)]
            with pytest.raises(ValueError, match="is held out, and nothing may be learned from it"):
                session.prepare(reader.read(rows))
            session.policy.mtp = None
            with pytest.raises(ValueError, match="teach a draft head, and this policy has none"):
                session.prepare(lessons)
            session.record(step, metrics)


@pytest.mark.parametrize("lessons_first", [True, False])
def test_lessons_and_rollouts_in_one_update_move_the_routers_biases(micro_config, tmp_path, lessons_first):
    """As rollouts do alone: lessons have no term of the routers."""
    config = micro_config(tmp_path / "r", steps=1, **{"balance.bias_rate": 0.1})
    with Session.open(config) as session:
        for step in session.run.steps():
            reader = HeadLearner(session.plain or session.policy, HeadOptions(), temperature=1.0, seed=0)
            session.policy.trunk.requires_grad_(True)
            lessons = session.prepare(reader.read(session.solutions(4)))
            drawn = session.prepare(session.draw(step))
            before = [b.clone() for n, b in session.policy.named_buffers() if n.endswith("correction_bias")]
            for batch in (lessons, drawn) if lessons_first else (drawn, lessons):
                session.forward_backward(batch)
            metrics = session.optim_step()
            now = [b for n, b in session.policy.named_buffers() if n.endswith("correction_bias")]
            assert before
            assert any(not torch.equal(one, other) for one, other in zip(before, now, strict=True))
            assert any(name.startswith("moe/") for name in metrics)
            session.record(step, metrics)


def test_weight_decay_of_ones_own_is_on_matrices_alone(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r", steps=1)) as session:
        for step in session.run.steps():
            session.forward_backward(session.prepare(session.draw(step)), minus)
            session.optim_step(weight_decay=0.5)
            for group in session.learner.optimizer.param_groups:
                assert group["weight_decay"] == (0.5 if group["params"][0].dim() > 1 else 0.0)
            with pytest.raises(TypeError, match="beta"):
                session.optim_step(beta=(0.5, 0.5))
            session.record(step, {})


def test_an_update_outside_of_a_step_is_refused(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path / "r")) as session:
        batch = session.prepare(session.sample(session.prompts(1), step=1))
        session.forward_backward(batch)
        with pytest.raises(RuntimeError, match="for step in run.steps"):
            session.optim_step()


@pytest.fixture
def own_run(micro_config, tmp_path):
    """The file of a short run with adapters."""
    options = {"lora": {"rank": 2}, "learner.learning_rate": 1e-2, "steps": 4}
    return written(micro_config(tmp_path / "unused", **options), tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["per_token.py", pytest.param("best_of_n.py", marks=pytest.mark.slow)])
def test_examples_of_loops_learn(own_run, tmp_path, monkeypatch, name):
    run_loop(monkeypatch, name, own_run, tmp_path / "r")
    metrics = read_metrics(tmp_path / "r")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert any(line.get("policy/step_kl", 0) > 0 for line in metrics)
    assert (tmp_path / "r/policy/model.safetensors").exists()


def test_problems_with_different_rewards_are_drawn_more_often(own_run, tmp_path, monkeypatch):
    """Of ten problems one has a variance of 1/4 and nine have 0, which counts as 1/100: 25 of 34 first draws."""
    loop = run_loop(monkeypatch, "by_difficulty.py", own_run, tmp_path / "r")
    metrics = read_metrics(tmp_path / "r")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    problems = [SimpleNamespace(example_id=str(i)) for i in range(10)]
    listener = loop["ByDifficulty"](problems)
    groups = [SimpleNamespace(prompt=SimpleNamespace(prompt_id=problem.example_id)) for problem in problems]
    scores = [GroupScore([1.0, None, float(i != 3)], {}) for i in range(10)]
    listener.sampled(1, groups, scores)
    drawn = [listener.choose(2, step, 0) for step in range(400)]
    assert all(first is not second for first, second in drawn)
    assert sum(likeliest.example_id == "3" for _, likeliest in drawn) == pytest.approx(400 * 25 / 34, abs=40)


@pytest.mark.slow
def test_the_best_of_n_becomes_likelier(own_run, tmp_path, monkeypatch):
    run_loop(monkeypatch, "best_of_n.py", own_run, tmp_path / "r")
    losses = [line["loss/own"] for line in read_metrics(tmp_path / "r")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_policies_play_and_become_two(own_run, tmp_path, monkeypatch):
    run_loop(monkeypatch, "two_policies.py", own_run, tmp_path / "one", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("one", "two"))
    assert any(not torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sampled(tmp_path / "one") != sampled(tmp_path / "two")


def test_dpo_prefers_what_was_chosen(own_run, tmp_path, monkeypatch):
    pairs = [{"prompt": f"{i}+1=", "chosen": "aa", "rejected": "zz"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run_loop(monkeypatch, "dpo.py", own_run, tmp_path / "r", tmp_path / "pairs.jsonl")
    losses = [line["loss/own"] for line in read_metrics(tmp_path / "r")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are the same
    assert losses[-1] < losses[0] - 0.01


def test_loops_are_as_short_as_is_promised():
    for file in LOOPS.glob("*.py"):
        code = [line for line in file.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= (15 if file.name == "train.py" else 30), file.name


def weights(folder, step):
    return load_file(folder / f"checkpoints/step_{step:06d}/policy.safetensors")


def learn_one_step(session, step):
    batch = session.prepare(session.draw(step))
    metrics = session.forward_backward(batch) | session.optim_step()
    session.publish()
    session.record(step, metrics)
    session.save_if_due(step)


@pytest.mark.parametrize("place", ["after the step", "after the update", "before the update"])
def test_contract_9_a_loop_that_is_left_keeps_what_it_learned(micro_config, tmp_path, place):
    """A step whose weights have moved counts, and one that had none is given up, as for an exception."""
    given = {"warm_start.steps": 0, "eval.limit": 0, "steps": 4, "checkpoint.every": 10}
    config = micro_config(tmp_path / "left", **given)

    def leave(session):
        for step in session.run.steps():
            if step < 3:
                learn_one_step(session, step)
                if place == "after the step" and step == 2:
                    return
            elif place == "before the update":
                session.prepare(session.draw(step))
                break

            if place == "after the update" and step == 2:
                break

    with Session.open(config) as session:
        leave(session)
    assert [int(path.name[5:]) for path in (tmp_path / "left/checkpoints").iterdir()] == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "left")] == [1, 2]
    with Session.open(config, resume="auto") as session:
        assert session.step == 2
        for step in session.run.steps():
            learn_one_step(session, step)
    with Session.open(micro_config(tmp_path / "whole", **given)) as session:
        for step in session.run.steps():
            learn_one_step(session, step)
    one, other = weights(tmp_path / "left", 4), weights(tmp_path / "whole", 4)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sampled(tmp_path / "left") == sampled(tmp_path / "whole")


def test_a_loop_that_is_left_in_an_update_has_the_line_of_its_step(micro_config, tmp_path):
    config = micro_config(tmp_path, **{"warm_start.steps": 0, "eval.limit": 0, "checkpoint.every": 10})
    with Session.open(config) as session:
        for step in session.run.steps():
            session.forward_backward(session.prepare(session.draw(step)))
            session.optim_step()
            break
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert (tmp_path / "checkpoints/step_000001").is_dir()


def test_a_stop_after_load_resumes_the_weights_that_were_loaded(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **{"warm_start.steps": 0, "eval.limit": 0, "steps": 4})

    def roll_back():
        with Session.open(config) as session:
            before = session.save(tmp_path / "kept")
            for step in session.run.steps():
                learn_one_step(session, step)
                if step == 2:
                    session.load(before)
                    raise Stopped

    with pytest.raises(Stopped):
        roll_back()
    loaded = load_file(tmp_path / "kept/step_000000/policy.safetensors")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights(tmp_path / "run", 2).items())
    with Session.open(config, resume="auto") as session:
        assert session.step == 2
        assert all(
            torch.equal(tensor, loaded[name]) for name, tensor in session.policy.named_parameters() if name in loaded
        )

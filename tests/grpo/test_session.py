"""The primitives: loops of one's own, what they give, and what they refuse."""

import copy
import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zstandard
from safetensors.torch import load_file
from start_ranks import run_ranks
from tokenizers.processors import TemplateProcessing

from grpo import Session
from grpo.config.loss import LossOptions
from grpo.config.mtp import HeadOptions
from grpo.config.run import SftConfig
from grpo.evaluation.held_out import HeldOut
from grpo.learner.head_learner import HeadLearner
from grpo.run.checkpoint import CheckpointError
from grpo.run.stop import Stopped
from grpo.sft import sft
from grpo.train import train
from review.readers.run_folder import read_events, read_metrics
from rewards.config.options import dump_yaml
from rewards.group_score import GroupScore
from rollout.faults import RolloutError
from rollout.workers.local_pool import LocalPool

LOOPS = Path(__file__).parents[2] / "examples/09_own_loop"
QUICK = {"sft.steps": 0}
SHORT = QUICK | {"eval.limit": 0, "steps": 4, "checkpoint.every": 10}


@pytest.fixture(scope="module")
def opened(micro_config, tmp_path_factory):
    """A session in its only step, what it has drawn for it, and its checkpoint from before."""
    folder = tmp_path_factory.mktemp("opened")
    given = {"steps": 1, "eval.limit": 4, "balance.bias_rate": 0.1, "reward.on_error": "drop_sample"}
    with Session.open(micro_config(folder / "run", **QUICK | given)) as session:
        for step in session.run.steps():
            start = session.save(folder / "start")
            yield session, session.draw(step), start


@pytest.fixture
def session(opened):
    """That session as it was at the beginning of the step."""
    session, _, start = opened
    session.load(start)
    return session


@pytest.fixture
def batch(session, opened):
    return session.prepare(opened[1])


def gradients(session):
    found = {name: p.grad.clone() for name, p in session.policy.named_parameters() if p.grad is not None}
    session.learner.update.zero()
    session.learner.waiting.clear()
    return found


def likelier(logprobs, sampling_logprobs, advantages, mask):
    return -logprobs


def less_likely(logprobs, sampling_logprobs, advantages, mask):
    return logprobs


def squares(logprobs, sampling_logprobs, advantages, mask):
    return logprobs.square()


def without_ray(monkeypatch):
    """A copy of the policy in this process samples ahead, as a Ray worker would, which starts slowly."""
    monkeypatch.setattr("grpo.steps.pool.open_pool", lambda policy, options: LocalPool(policy.merged(), options))


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
        pytest.param(QUICK | {"learner.updates_per_batch": 2, "loss.beta": 0.1}, marks=pytest.mark.slow),
        pytest.param({"rollout.staleness": 1}, marks=pytest.mark.slow),
    ],
    ids=["plain", "two updates", "ahead"],
)
def test_contract_17_a_loop_over_the_primitives_gives_the_bits_of_quartet_train(
    micro_config, tmp_path, monkeypatch, options
):
    steps = 4  # one more than an epoch has
    if "rollout.staleness" in options:
        without_ray(monkeypatch)
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
            batch = session.prepare_solutions(session.solutions(4))
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
    given = {"model": str(tmp_path / "model"), "device": "cpu", "sft.steps": 0, "steps": 2}
    config = micro_config(tmp_path / "ours", rewards=[{"function": "gsm8k_format"}], **given)
    file = written(config, tmp_path / "run.yaml")
    run_ranks(["-m", "grpo", "train", str(file)], 2)
    run_ranks([str(LOOPS / "train.py"), str(file), f"output_dir={tmp_path / 'theirs'}"], 2)
    assert_same_run(tmp_path / "ours", tmp_path / "theirs", 2)


@pytest.mark.slow
def test_drawing_is_prompts_sampling_and_scoring(micro_config, tmp_path):
    configs = [micro_config(tmp_path / name, **QUICK) for name in ("one", "two")]
    with Session.open(configs[0]) as one, Session.open(configs[1]) as two:
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
                session.sync_weights()
    assert all(
        torch.equal(tensor, dict(two.policy.named_parameters())[name]) for name, tensor in one.policy.named_parameters()
    )


def test_a_first_batch_that_sampler_and_learner_read_differently_stops_the_run(micro_config, tmp_path, monkeypatch):
    """The canaries are too short to show it."""
    far = {"mismatch/logprob_abs_max": 0.2, "mismatch/logprob_abs_mean": 0.01}
    with Session.open(micro_config(tmp_path, **QUICK)) as session:
        monkeypatch.setattr(session.learner, "forward_backward", lambda *rest: far)
        for step in session.run.steps():
            batch = session.prepare(session.draw(step))
            with pytest.raises(RolloutError, match=r"up to 0.2 nats .*, before any update: .*`quartet check micro`"):
                session.forward_backward(batch)
            far["mismatch/logprob_abs_mean"] = 1e-4  # one token, whose experts are others
            session.forward_backward(batch)
            break


def test_contract_13_what_was_refused_is_checked_again_before_anything_is_sampled(session, monkeypatch):
    prompts, weight_sync = session.prompts(1), session.weight_sync
    expected = session.sample(prompts, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(weight_sync, "scores", lambda *_: 1 / 0)
        for act in (
            lambda: weight_sync.sync_weights(),
            lambda: session.draw(1),
            lambda: session.sample(prompts, step=1),
            lambda: session.evaluate(),
        ):
            with pytest.raises(ZeroDivisionError):
                act()
    assert session.sample(prompts, step=1) == expected
    assert weight_sync.version == 0


def test_an_advantage_of_each_token_is_the_gradients_weight(session):
    """Advantages of one completion's tokens alone, by a hand-written loss of the same tokens."""
    groups = session.sample(session.prompts(1), step=1)
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    advantages = [[[float(t + 1) * (i == 0) for t in range(n)] for i, n in enumerate(row)] for row in lengths]
    session.forward_backward(session.prepare(groups, advantages=advantages))
    found = gradients(session)

    def by_hand(logprobs):
        size, total = len(groups[0].completions), sum(map(len, logprobs))
        weights = [torch.arange(1.0, len(row) + 1) * (i % size == 0) for i, row in enumerate(logprobs)]
        ratios = [(row - row.detach()).exp() for row in logprobs]
        return -sum((w * r).sum() for w, r in zip(weights, ratios, strict=True)) / total

    session.forward_backward(session.prepare(groups, advantages=[[0.0] * len(row) for row in lengths]), by_hand)
    expected = gradients(session)
    trunk = [name for name in found if name.startswith("trunk.")]
    for name in trunk:
        torch.testing.assert_close(expected[name], found[name], atol=1e-6, rtol=1e-4)
    assert sum(found[name].norm() for name in trunk) > 1e-3


def test_numbers_of_ones_own_move_the_weights_and_decay_matrices_alone(session, batch):
    session.forward_backward(batch, likelier)
    metrics = session.optim_step(3e-4, betas=(0.5, 0.5), weight_decay=0.5)
    assert metrics["learner/learning_rate"] == pytest.approx(3e-4)
    for group in session.learner.optimizer.param_groups:
        assert group["betas"] == (0.5, 0.5)
        assert group["weight_decay"] == (0.5 if group["params"][0].dim() > 1 else 0.0)
    with pytest.raises(TypeError, match="beta"):
        session.optim_step(beta=(0.5, 0.5))


@pytest.mark.parametrize(
    "numbers",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1e-3},
        {"weight_decay": float("inf")},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"eps": float("nan")},
    ],
    ids=str,
)
def test_numbers_that_would_make_weights_nan_are_refused_and_nothing_moves(session, batch, numbers):
    """They had moved all weights without a word; the next step was the first to notice."""
    session.forward_backward(batch)
    groups = [dict(group, params=None) for group in session.learner.optimizer.param_groups]
    with pytest.raises(ValueError, match=f"{next(iter(numbers))}=.*: use "):
        session.optim_step(**numbers)
    assert [dict(group, params=None) for group in session.learner.optimizer.param_groups] == groups
    assert session.learner.waiting
    assert all(p.isfinite().all() for p in session.policy.parameters())
    session.learner.drop()


def test_a_loss_of_all_solutions_gets_each_of_them(session, opened):
    """Its gradient is that of supervised steps where the loss is the same."""
    seen, norms = [], []

    def mean(logprobs):
        seen.append([len(one) for one in logprobs])
        return -torch.cat(list(logprobs)).mean()

    rows = session.solutions(3)
    rows[1] = replace(rows[1], samples=[replace(one, token_ids=one.token_ids[:-3]) for one in rows[1].samples])
    for loss in ("supervised", mean):
        session.load(opened[2])
        session.forward_backward(session.prepare_solutions(rows), loss)
        norms.append(session.optim_step(1e-12)["learner/grad_norm"])
    assert seen[0] == [row.num_completion_tokens for row in rows]
    assert len(set(seen[0])) > 1
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_contract_3_lossy_acceptance_is_refused_where_it_would_be_learned_from(session):
    prompts = session.prompts(1)
    with pytest.raises(ValueError, match="accept='margin': takes drafts unverified"):
        session.sample(prompts, step=1, accept="margin", margin=0.0, draft_tokens=2)
    assert session.sample(prompts, step=1, accept="exact") == session.sample(prompts, step=1)


def test_log_probabilities_are_those_that_were_sampled(session):
    prompts = session.prompts(1)
    groups = session.sample(prompts, step=1)
    scored = session.logprobs(prompts, [[c.token_ids for c in group.completions] for group in groups])
    for group, rows in zip(groups, scored, strict=True):
        for completion, row in zip(group.completions, rows, strict=True):
            assert row == pytest.approx(completion.logprobs, abs=1e-4)


def test_texts_of_ones_own_are_as_if_they_had_been_sampled_now(session):
    """An importance weight of log-probabilities that stand as 0 would be the policy's own probability."""
    for _ in range(2):
        group = session.group("3 + 4 = ?", ["#### 7", "#### 8"])
        [expected] = session.logprobs([group.prompt], [[c.token_ids for c in group.completions]])
        assert [c.logprobs for c in group.completions] == expected
        assert all(max(c.logprobs) < 0 for c in group.completions)
        metrics = session.learn(session.prepare([group], [GroupScore([1.0, 0.0], {})]))
        assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.0, abs=1e-4)


def test_a_prompt_of_ones_own_stays_open_and_has_a_token(session, monkeypatch):
    """Some tokenizers end every text with eos, as prompts of the data know; the answer would come after the end."""
    tokenizer = copy.deepcopy(session.policy.tokenizer)
    ends = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=ends)
    expected = session.group("3 + 4 = ?", ["#### 7"])
    monkeypatch.setattr(session.policy, "tokenizer", tokenizer)
    assert session.group("3 + 4 = ?", ["#### 7"]).prompt.token_ids == expected.prompt.token_ids
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        session.group("", ["#### 7"])
    with pytest.raises(ValueError, match="group 0: its prompt has no tokens"):
        session.prepare([replace(expected, prompt=replace(expected.prompt, token_ids=[]))])


def test_no_prompts_are_drawn_where_none_are_asked_for(session):
    """As many as there are tied groups, of which there may be none."""
    assert session.prompts(1, 0, draw=1) == []
    assert len(session.prompts(1, draw=1)) == session.config.prompts_per_step


@pytest.mark.parametrize(
    "loss",
    [
        lambda logprobs, sampling_logprobs, advantages, mask: -(advantages * logprobs).mean(),
        lambda logprobs, sampling_logprobs, advantages, mask: -(advantages * logprobs).sum(-1, keepdim=True),
    ],
    ids=["a mean", "a number for each completion"],
)
def test_a_loss_that_is_not_of_every_token_is_refused(session, batch, loss):
    """It had counted once for every token."""
    with pytest.raises(ValueError, match=r"the loss of PerToken has the shape .*; return one number for each token"):
        session.forward_backward(batch, loss)
    assert not gradients(session)


def test_contract_6_other_rewards_score_the_same_groups_and_a_failure_of_theirs_is_data_too(session):
    """As the run's option says, and an event."""
    groups = session.sample(session.prompts(1), step=1, group_size=3)
    assert {len(group.completions) for group in groups} == {3}
    scores = session.score(groups, lambda completions, **columns: [float(len(text)) for text in completions])
    assert [score.rewards for score in scores] == [[float(len(t)) for t in group.texts] for group in groups]

    def mine(completions, **columns):
        return [ValueError("x") if i == 0 else 1.0 for i in range(len(completions))]

    [score] = session.score(groups[:1], mine)
    assert score.rewards == [None, 1.0, 1.0]
    events = [event for event in read_events(session.run.folder) if event["event"] == "reward_error"]
    assert [event["function"] for event in events] == ["mine"]


@pytest.mark.parametrize("how", ["draw", "sample and score"])
def test_contract_6_a_failure_of_the_runs_own_reward_is_an_event_in_every_loop(micro_config, tmp_path, how):
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions, **_): return [1.0 if '####' in c else float('nan') for c in completions]\n")
    rewards = [{"function": f"{file}:mine"}]
    config = micro_config(tmp_path / "run", rewards=rewards, **QUICK | {"steps": 1, "reward.on_error": "drop_sample"})
    failed = []
    with Session.open(config) as session:
        for step in session.run.steps():
            if how == "draw":
                scores = session.draw(step).scores
            else:
                scores = session.score(session.sample(session.prompts(step), step=step))
            failed += [(error.prompt_id, error.sample_index) for score in scores for error in score.errors]
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "reward_error"]
    assert [(event["prompt_id"], event["sample_index"]) for event in events] == failed
    assert len(failed) > 8
    assert {event["step"] for event in events} == {1}


def test_contract_9_numbers_of_ones_own_are_those_of_the_checkpoint(micro_config, tmp_path):
    """They hold from their step on, also after a resume; an earlier checkpoint has those from before."""

    def numbers(session):
        return [(g["betas"], g["eps"], g["weight_decay"]) for g in session.learner.optimizer.param_groups]

    config, seen = micro_config(tmp_path / "r", **QUICK), []

    def loop():
        with Session.open(config, stop_after=2) as session:
            for step in session.run.steps():
                seen.append((session.save(tmp_path / f"kept_{step}"), numbers(session)))
                session.forward_backward(session.prepare(session.draw(step)))
                session.optim_step(**{"betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.1} if step == 2 else {})
                seen[-1] += (numbers(session),)
                session.sync_weights()
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
    with Session.open(micro_config(tmp_path / "r", steps=4, **QUICK)) as session:
        for step in session.run.steps():
            if step == 3:
                path = session.save(tmp_path / "kept")
                before = {name: p.detach().clone() for name, p in session.policy.named_parameters()}
            drawn = session.draw(step)
            session.record(step, session.learn(session.prepare(drawn)))
            session.sync_weights()
        version = session.weight_sync.version
        session.load(path)
        assert all(torch.equal(before[name], p) for name, p in session.policy.named_parameters())
        assert session.weight_sync.version == session.learner.policy_version == version - 2
        again = session.sample(session.prompts(3), step=3)
    assert [c.token_ids for g in again for c in g.completions] == sampled(tmp_path / "r")["step_000003.jsonl.zst"]


def test_a_checkpoint_from_before_the_first_update_leaves_no_moments(opened):
    ends = []
    session, drawn, start = opened
    for _ in range(2):
        session.load(start)
        assert not session.learner.optimizer.state
        session.learn(session.prepare(drawn))
        ends.append([parameter.detach().clone() for parameter in session.policy.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_contract_5_a_policy_that_is_loaded_reaches_the_samplers_though_its_version_is_the_one_they_have(
    session, tmp_path
):
    """Two policies of version 1, by two losses from one start: each samples what it sampled before it was saved."""
    prompts, start = session.prompts(1), session.save(tmp_path / "start")
    batch = session.prepare(session.sample(prompts, step=1))
    known = []
    for loss in (likelier, less_likely):
        session.load(start)
        session.forward_backward(batch, loss)
        session.optim_step(0.05)
        session.sync_weights()
        assert session.weight_sync.version == session.learner.policy_version == 1
        path = session.save(tmp_path / loss.__name__)
        known.append((path, session.sample(prompts, step=1)))
    (one, by_one), (_, by_other) = known
    assert by_one != by_other
    session.load(one)
    assert session.sample(prompts, step=1) == by_one


def test_a_damaged_checkpoint_changes_neither_the_policy_nor_what_is_sampled(session, batch, tmp_path):
    path = session.save(tmp_path / "kept")
    session.learn(batch)
    session.sync_weights()
    weights = [parameter.detach().clone() for parameter in session.policy.parameters()]
    prompts = session.prompts(1)
    before = session.sample(prompts, step=1)
    file = next(path.glob("policy*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        session.load(path)
    assert all(torch.equal(one, other) for one, other in zip(weights, session.policy.parameters(), strict=True))
    assert session.sample(prompts, step=1) == before


def test_losses_that_cannot_be_are_refused_by_name_and_another_one_is_heeded(session, opened):
    groups = opened[1].groups
    tied = session.prepare(groups, [GroupScore([1.0] * len(group.completions), {}) for group in groups])
    for loss, message in (
        (lambda a, b, c: a, "a loss of 3 parameters"),
        (lambda policy, reference: policy[0].sum(), "there is no reference"),
        ("dapoo", "loss_type"),
        (LossOptions(beta=0.1), "beta=0.1: there is no reference; set loss.beta in the configuration"),
        (LossOptions(mask_truncated_completions=True), "mask_truncated_completions=True: batches are .*=False"),
    ):
        with pytest.raises(ValueError, match=message):
            session.forward_backward(tied, loss)
    session.forward_backward(tied, LossOptions(entropy_coef=1.0))  # nothing else teaches here
    assert session.optim_step()["learner/grad_norm"] > 0


def test_the_last_evaluation_is_of_what_a_loop_has_learned_and_it_is_not_told_that_this_is_nothing(
    micro_config, tmp_path, monkeypatch
):
    """A loop may publish never, and learn from rewards that are all the same."""
    versions, evaluate = [], HeldOut.evaluate
    with Session.open(micro_config(tmp_path / "r", **QUICK | {"eval.limit": 2, "lora.rank": 2})) as session:

        def noted(held_out, *rest):
            versions.append(session.weight_sync.version)
            return evaluate(held_out, *rest)

        monkeypatch.setattr(HeldOut, "evaluate", noted)
        groups = session.sample(session.prompts(1), step=1)
        for step in session.run.steps():
            scores = [GroupScore([1.0] * len(group.completions), {}) for group in groups]
            session.forward_backward(session.prepare(groups, scores), likelier)
            session.record(step, session.optim_step())
        session.finish()
        assert versions[-1] == session.learner.policy_version == 3
    assert not [event for event in read_events(tmp_path / "r") if event["event"] == "nothing_learned"]


@pytest.mark.slow
def test_a_loop_that_samples_itself_has_nothing_sampled_ahead(micro_config, tmp_path, monkeypatch):
    seen = []
    without_ray(monkeypatch)
    for ahead in (0, 1):
        config = micro_config(tmp_path / str(ahead), steps=2, **QUICK | {"rollout.staleness": ahead})
        with Session.open(config) as session:
            for step in session.run.steps():
                groups = session.sample(session.prompts(step), step=step)
                seen.append([group.prompt.prompt_id for group in groups])
                session.forward_backward(session.prepare(groups, session.score(groups)))
                session.record(step, session.optim_step())
                session.sync_weights()
                assert session.weight_sync.version == step
            assert session.batches.ready == {}
    assert seen[:2] == seen[2:]


def test_a_step_that_fails_takes_no_prompts_with_it_either(micro_config, tmp_path):
    """A loop over `prompts` that fails in step 2 before its update asks for the same prompts when it goes on."""
    config, asked = micro_config(tmp_path / "r", **QUICK | {"checkpoint.every": 10}), {}

    def loop(fails, **flags):
        with Session.open(config, **flags) as session:
            for step in session.run.steps():
                prompts = session.prompts(step)
                asked.setdefault(step, []).append([prompt.prompt_id for prompt in prompts])
                if step == fails:
                    raise OSError("the reward's server is gone")
                groups = session.sample(prompts, step=step)
                session.record(step, session.learn(session.prepare(groups, session.score(groups))))
                session.sync_weights()
                session.save_if_due(step)
            session.finish()

    with pytest.raises(OSError, match="server is gone"):
        loop(2)
    loop(None, resume="auto")
    assert asked[2][0] == asked[2][1]
    assert asked[2][0] != asked[3][0]


@pytest.mark.slow
def test_sessions_share_one_frozen_base(micro_config, tmp_path):
    lora = {"lora": {"rank": 2}, "steps": 2, "sft.steps": 1}
    first, second = (micro_config(tmp_path / name, seed=seed, **lora) for seed, name in enumerate(("one", "two")))
    with Session.open(first) as one, Session.open(second, base=one) as two:
        weights, others = dict(one.policy.trunk.named_parameters()), dict(two.policy.trunk.named_parameters())
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        assert frozen
        assert all(weights[name] is others[name] for name in frozen)
        before = {name: weight.detach().clone() for name, weight in others.items()}
        for step in one.run.steps():
            one.record(step, one.learn(one.prepare(one.draw(step))))
            one.sync_weights()
        assert all(torch.equal(before[name], weight) for name, weight in others.items())
        moved = [name for name in weights if name not in frozen]
        assert any(not torch.equal(weights[name], others[name]) for name in moved)


def test_a_base_that_moves_is_refused(session, micro_config, tmp_path):
    other = Session.open(micro_config(tmp_path / "two", **QUICK), base=session)
    with pytest.raises(ValueError, match="set lora in both"), other:
        pass


def test_several_updates_of_a_batch_are_a_step_of_the_learner(opened, monkeypatch):
    """What is done once a step is done once: the routers' biases move by their rate."""
    session, drawn, start = opened
    monkeypatch.setattr(session.learner, "options", session.learner.options.model_copy(update={"updates_per_batch": 2}))
    policies = []
    for learn in (session.learn, session.learner.step):
        session.load(start)
        assert learn(session.prepare(drawn))["learner/updates"] == 2
        policies.append({name: tensor.clone() for name, tensor in session.learner.state()[0]["policy"].items()})
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())


def test_two_losses_on_one_batch_add_up(session, batch):
    """The second call goes on with nothing of the first: its own loss is what it adds."""
    found = []
    for chosen in ([likelier], [squares], [likelier, squares]):
        for loss in chosen:
            session.forward_backward(batch, loss)
        found.append(gradients(session))
    one, other, both = found
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, one[name] + other[name], atol=1e-6, rtol=1e-4)


def test_contract_16_what_is_held_out_is_not_learned_and_what_was_learned_is_not_evaluated(session):
    groups = session.sample(session.held_out.prompts[:1], step=1)
    with pytest.raises(ValueError, match="is held out, and nothing may be learned from it"):
        session.prepare(groups, session.score(groups))
    with pytest.raises(ValueError, match="were trained on"):
        session.evaluate(session.task.train[:2])
    assert session.evaluate(session.task.held_out[:2])["sampled"].prompts == 2


def lessons_of(session):
    reader = HeadLearner(session.plain or session.policy, HeadOptions(), temperature=1.0, seed=0)
    session.policy.trunk.requires_grad_(True)
    return reader


def test_recorded_lessons_teach_the_draft_head_and_nothing_else(session, monkeypatch):
    reader = lessons_of(session)
    lessons = reader.read(session.solutions(4))
    before = {name: tensor.clone() for name, tensor in session.policy.named_parameters()}
    assert session.forward_backward(session.prepare_lessons(lessons))["loss/mtp"] > 0
    session.optim_step()
    moved = {name for name, now in session.policy.named_parameters() if not torch.equal(now, before[name])}
    assert moved
    assert all(name.startswith("mtp.") for name in moved)
    token, [example, *_] = session.policy.stop_token_ids[0], session.task.held_out
    rows = [session.task.solution(example, session.policy.tokenizer, token)]
    with pytest.raises(ValueError, match="is held out, and nothing may be learned from it"):
        session.prepare_lessons(reader.read(rows))
    monkeypatch.setattr(session, "policy", SimpleNamespace(mtp=None, tokenizer=session.policy.tokenizer))
    with pytest.raises(ValueError, match="teach a draft head, and this policy has none"):
        session.prepare_lessons(lessons)


@pytest.mark.parametrize("lessons_first", [True, False])
def test_lessons_and_rollouts_in_one_update_move_the_routers_biases(session, batch, lessons_first):
    """As rollouts do alone: lessons have no term of the routers."""
    lessons = session.prepare_lessons(lessons_of(session).read(session.solutions(4)))
    buffers = [b for name, b in session.policy.named_buffers() if name.endswith("correction_bias")]
    before = [bias.clone() for bias in buffers]
    for each in (lessons, batch) if lessons_first else (batch, lessons):
        session.forward_backward(each)
    session.optim_step()
    assert before
    session.sync_weights()
    assert any(not torch.equal(one, other) for one, other in zip(before, buffers, strict=True))
    assert any(name.startswith("moe/") for name in session.step.metrics)


@pytest.fixture
def own_run(micro_config, tmp_path):
    """The file of a short run with adapters."""
    options = QUICK | {"lora": {"rank": 2}, "steps": 4}
    return written(micro_config(tmp_path / "unused", **options), tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["per_token.py", pytest.param("best_of_n.py", marks=pytest.mark.slow)])
def test_examples_of_loops_learn(own_run, tmp_path, monkeypatch, name):
    run_loop(monkeypatch, name, own_run, tmp_path / "r")
    metrics = read_metrics(tmp_path / "r")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert any(line.get("policy/approx_kl", 0) > 0 for line in metrics)
    assert (tmp_path / "r/policy/model.safetensors").exists()
    if name == "best_of_n.py":  # the best becomes likelier
        assert metrics[-1]["loss/custom"] < metrics[0]["loss/custom"]


def test_problems_with_different_rewards_are_drawn_more_often(own_run, tmp_path, monkeypatch):
    """Of ten problems one has a variance of 1/4 and nine have 0, which counts as 1/100: 25 of 34 first draws."""
    loop = run_loop(monkeypatch, "by_difficulty.py", own_run, tmp_path / "r")
    metrics = read_metrics(tmp_path / "r")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    problems = [SimpleNamespace(example_id=str(i)) for i in range(10)]
    callback = loop["ByDifficulty"](problems)
    groups = [SimpleNamespace(prompt=SimpleNamespace(prompt_id=problem.example_id)) for problem in problems]
    scores = [GroupScore([1.0, None, float(i != 3)], {}) for i in range(10)]
    callback.on_groups_sampled(1, groups, scores)
    drawn = [callback.choose_prompts(2, step, 0) for step in range(400)]
    assert all(first is not second for first, second in drawn)
    assert sum(likeliest.example_id == "3" for _, likeliest in drawn) == pytest.approx(400 * 25 / 34, abs=40)


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
    losses = [line["loss/custom"] for line in read_metrics(tmp_path / "r")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are the same
    assert losses[-1] < losses[0] - 0.01


def weights(folder, step):
    return load_file(folder / f"checkpoints/step_{step:06d}/policy.safetensors")


def learn_one_step(session, step):
    batch = session.prepare(session.draw(step))
    metrics = session.forward_backward(batch) | session.optim_step()
    session.sync_weights()
    session.record(step, metrics)
    session.save_if_due(step)


@pytest.fixture(scope="module")
def undisturbed(micro_config, tmp_path_factory):
    """The folder of a loop of four steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Session.open(micro_config(folder, **SHORT)) as session:
        for step in session.run.steps():
            learn_one_step(session, step)
    return folder


@pytest.mark.parametrize("place", ["after the step", "after the update", "before the update", "by a stop"])
def test_contract_9_a_loop_that_is_left_keeps_what_it_learned(micro_config, undisturbed, tmp_path, place):
    """A step whose weights have moved counts, and one that had none is given up, as for an exception."""
    config = micro_config(tmp_path / "left", **SHORT)

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

    stops = place == "by a stop"
    with pytest.raises(Stopped) if stops else nullcontext(), Session.open(config, stop_after=2 * stops or None) as one:
        leave(one)
    assert [int(path.name[5:]) for path in (tmp_path / "left/checkpoints").iterdir()] == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "left")] == [1, 2]
    with Session.open(config, resume="auto") as session:
        assert session.step == 2
        for step in session.run.steps():
            learn_one_step(session, step)
    one, other = weights(tmp_path / "left", 4), weights(undisturbed, 4)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sampled(tmp_path / "left") == sampled(undisturbed)
